"""Tests of the store, each on SQLite and on PostgreSQL.

A file that says so in its docstring has what only one of them has: several operators on one
database, lost connections, notifications.
"""
