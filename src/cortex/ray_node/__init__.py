"""The processes in a Ray cluster: Ray's driver, and an agent on each node.

An agent combines the local engine with the building of environments, as an operator does on one
machine. Only this package imports Ray; the engine (`cortex.engines.ray`) reaches it through a
socket.
"""
