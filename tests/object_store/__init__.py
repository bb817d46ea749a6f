"""Tests of `ObjectStore` on a folder and on an S3 server."""
