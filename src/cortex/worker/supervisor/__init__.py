"""The supervising process: takes orders, runs one job at a time, and records how it ended."""
