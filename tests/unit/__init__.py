"""Tests of one part each, in the test's own process."""
