"""The engine of a Ray cluster.

An agent on each node runs jobs with the local engine, and Ray reserves what each job takes. Nothing
here imports Ray: a separate process does (`cortex.ray_node.driver`).
"""

from __future__ import annotations

from cortex.engines.ray.engine import RayEngine

__all__ = ["RayEngine"]
