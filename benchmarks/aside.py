"""Peers that stand aside while another is measured: what their processes do when they have nothing to do
would take its time. `measurements` uses it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from service import children, descendants

T = TypeVar("T")
_CATCH_UP_S = 1  # what it has missed is not what is measured


class Aside:
    """Processes that are stopped, and all below them, but while something is done with them."""

    def __init__(self, roots: set[int]) -> None:
        self._roots = roots
        self._send(signal.SIGSTOP)

    def back(self, measure: Callable[[], T]) -> T:
        """Measure it, with all of them going on."""
        self._send(signal.SIGCONT)
        time.sleep(_CATCH_UP_S)
        try:
            return measure()
        finally:
            self._send(signal.SIGSTOP)

    def release(self) -> None:
        """Let them go on for good."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for root in self._roots:
            for pid in (root, *descendants(root)):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def started() -> set[int]:
    """The processes that this one has started."""
    return set(children().get(os.getpid(), ()))
