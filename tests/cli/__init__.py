"""Tests of the `cortex` command, against a stub of the operator, in this process or in one of its own."""
