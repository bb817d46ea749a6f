"""The engine of one machine: a supervising process per job, forked from a warm interpreter."""

from __future__ import annotations

from cortex.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
