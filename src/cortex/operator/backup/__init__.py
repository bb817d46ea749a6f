"""Backups: one file with all that an operator cannot make again, and back."""
