"""Tests of the command, the clients, the examples and the pages, as users have them."""
