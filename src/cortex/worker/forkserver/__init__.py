"""The fork server of one deployed version: a warm interpreter that forks supervisors."""
