"""Tests of the command, the clients, the examples and the pages' code, with a real operator."""
