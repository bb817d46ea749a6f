"""Backups: all data of an operator that it cannot recreate, in one file, and its restore."""
