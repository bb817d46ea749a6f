"""Tests of the operator's HTTP server on a socket, with an application of a few lines, and of the process
that reads large bodies."""
