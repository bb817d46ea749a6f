"""See `cortex_internal`."""
