"""Tests of a real operator over HTTP: what users rely on."""
