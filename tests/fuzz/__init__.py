"""Tests with odd requests, archives and configurations."""
