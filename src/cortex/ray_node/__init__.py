"""What a Ray cluster runs for an operator: the process that is Ray's driver, and an agent on each node,
which joins the local engine and the building of environments as an operator does on one machine.

All that imports Ray is in here; the engine (`cortex.engines.ray`) reaches it by a socket.
"""
