"""Tests that a job is plain Python: programs run as Python runs them, and as jobs."""
