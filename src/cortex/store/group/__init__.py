"""Several operators on one PostgreSQL database: their rows, the election of the leader, notifications, and locks."""
