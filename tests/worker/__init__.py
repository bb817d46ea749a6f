"""Tests of the worker and of the tasks' logger that need a process of their own."""
