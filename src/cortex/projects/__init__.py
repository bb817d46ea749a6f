"""A project - the folder of a `cortex.yaml` - packed, unpacked, checked, and its environment built."""
