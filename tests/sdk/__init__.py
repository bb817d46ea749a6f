"""Tests of the Python clients, against a stub of the operator that answers by HTTP."""
