"""The configuration of an operator: its settings, where each value comes from, and the paths in the data folder."""
