"""Tests of what every engine promises, and of what each has of its own."""
