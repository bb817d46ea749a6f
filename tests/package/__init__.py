"""Tests of what users install and read: the wheel, the public names, the examples, the pages."""
