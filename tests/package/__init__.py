"""Tests of what users install and read: the wheel, the public names, the pages. No operator runs."""
