"""The engine of one machine: each job has a supervisor, forked from a warm interpreter."""

from __future__ import annotations

from cortex.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
