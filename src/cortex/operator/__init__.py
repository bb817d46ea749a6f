"""The control plane: it takes requests, keeps the store, and drives an engine."""
