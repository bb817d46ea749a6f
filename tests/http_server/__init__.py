"""Tests of the operator's HTTP server on a socket, with an application of a few lines.

It also has the tests of the process that reads large bodies.
"""
