"""Tests of `system/` that need a process of their own, most of them as a user who is not root."""
