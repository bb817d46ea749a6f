"""The engine of a Ray cluster: an agent on each node runs jobs as the local engine does, and Ray reserves
what each job takes. Nothing here imports Ray; a process of its own does (`cortex.ray_node`).
"""

from __future__ import annotations

from cortex.engines.ray.engine import RayEngine

__all__ = ["RayEngine"]
