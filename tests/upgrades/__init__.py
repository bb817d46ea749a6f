"""Tests that start the operator on the data of an earlier version."""
