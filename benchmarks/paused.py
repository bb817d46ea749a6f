"""Pauses the peers while another service is measured: the work of their idle processes would slow
that service down. `measurements` uses it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from service import children_by_parent, descendants

T = TypeVar("T")
_CATCH_UP_S = 1  # resumed processes first do the work of the pause, which is not measured


class PausedProcesses:
    """Processes and their descendants that are stopped except while they are measured."""

    def __init__(self, roots: set[int]) -> None:
        self._roots = roots
        self._send(signal.SIGSTOP)

    def while_running(self, measure: Callable[[], T]) -> T:
        """Measure while the processes run."""
        self._send(signal.SIGCONT)
        time.sleep(_CATCH_UP_S)
        try:
            return measure()
        finally:
            self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the processes run from now on."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for root in self._roots:
            for pid in (root, *descendants(root)):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def started_processes() -> set[int]:
    """The processes that this process has started."""
    return set(children_by_parent().get(os.getpid(), ()))
