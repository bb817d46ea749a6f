"""Sees that a fork server does its work while somebody waits for that: users' code runs as its user, and can stop it,
trace it, or read what it is asked. One that was stopped is let go on; one that does not come to answer is ended, and
another takes its place. Owned by `forkserver`.

An import ahead may take minutes on a cold disk: a fork server that is not ready yet is ended for its silence by nobody
here.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Protocol

import structlog

from cortex.worker import processes

log = structlog.get_logger()

LOOK_S = 2.0
# Looks in a row, after which it is ended.
MOST_STOPPED = 3
MOST_ASLEEP = 5
"""One that has something to do is not asleep, whatever else the machine does."""
MOST_BUSY = 30

STOPPED = "waits for its fork server, which something has stopped (SIGSTOP, or a debugger)"
SILENT = "waits for its fork server, which does not answer"


class Watched(Protocol):
    """A fork server."""

    @property
    def ready(self) -> bool: ...

    @property
    def is_awaited(self) -> bool:
        """Whether it has something to do."""

    @property
    def pid(self) -> int | None: ...

    def send_signal(self, number: signal.Signals) -> None: ...

    def tell_waiting(self) -> None: ...


class HealthCheck:
    """One fork server's."""

    def __init__(self, server: Watched) -> None:
        self.why_still: str | None = None
        """Why it does not get on, in words."""
        self._server = server
        self._stopped = self._silent = self._asleep = 0
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """It has something to do."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def heard(self) -> None:
        """It has said something."""
        self._stopped = self._silent = self._asleep = 0
        self.why_still = None

    def close(self) -> None:
        """It is about to end."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        pid = self._server.pid
        if not self._server.is_awaited or pid is None:
            self.heard()
            return
        self.watch()
        try:
            about = processes.stat(pid)
        except OSError:
            return  # for want of descriptors: the next look comes
        state = "Z" if about is None else about[0]
        if state in "Tt":
            self._stopped += 1
            self.why_still = STOPPED
            self._server.send_signal(signal.SIGCONT)
        elif self._server.ready:
            self._stopped = 0
            self._silent += 1
            self._asleep = self._asleep + 1 if state == "S" else 0
            self.why_still = SILENT
        else:
            self.heard()
            return
        is_still = self._stopped >= MOST_STOPPED or self._asleep >= MOST_ASLEEP
        if is_still or self._silent >= MOST_BUSY:
            log.warning("a fork server is ended", pid=pid, reason=self.why_still)
            self._server.send_signal(signal.SIGKILL)
        self._server.tell_waiting()
