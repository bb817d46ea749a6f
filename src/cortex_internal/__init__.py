"""The names under which task code written for Cortex finds what is in `cortex`. Standard library
alone."""
