"""Tests of packing and of environments that need other users, uv and builds."""
