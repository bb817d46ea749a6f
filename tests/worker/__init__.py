"""Tests of the worker, the tasks' logger and Python's own variables that need a process of their own."""
