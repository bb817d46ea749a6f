"""Tests in which each network namespace is a machine of a cluster."""
