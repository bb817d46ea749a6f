"""The supervisor: it takes orders one after another, runs one job at a time, and records how it ended."""
