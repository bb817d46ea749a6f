"""A project is the folder of a `cortex.yaml`: packing, unpacking, checking and storing it, and
building its environment.
"""
