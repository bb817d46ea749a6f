"""The engine of a Ray cluster: an agent on each node runs jobs as the local engine does, and Ray holds
what each of them takes. Nothing here imports Ray: that is done by a process of its own (`cortex.ray_node`).
"""

from __future__ import annotations

from cortex.engines.ray.engine import RayEngine

__all__ = ["RayEngine"]
