"""Tests of the `cortex` command against a stub of the operator."""
