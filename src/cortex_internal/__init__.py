"""The names by which task code for Cortex finds what `cortex` has. Standard library alone."""
