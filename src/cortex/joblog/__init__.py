"""A job's folder and log: where they lie, how to read a log with a gap, how to notice changes."""
