"""Several operators on one PostgreSQL database: rows, leader election, notifications, locks."""
