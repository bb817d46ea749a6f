"""The configuration of an operator: its settings, their sources, the paths in the data folder."""
