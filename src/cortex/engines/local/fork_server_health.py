"""Checks that a fork server works while orders wait for it. Owned by `fork_server`.

Users' code runs as the fork server's user: it can stop or trace the process, or read the requests
from its socket. The health check sends SIGCONT to a stopped fork server, and kills one that does
not answer; the pool then starts another one. It does not kill a fork server for its silence before
that is ready: an import ahead may take minutes on a cold disk.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Protocol

import structlog

from cortex.worker import processes

log = structlog.get_logger()

POLL_INTERVAL_S = 2.0
# Polls in a row in one state, after which the fork server is killed.
MAX_STOPPED_POLLS = 3
MAX_ASLEEP_POLLS = 5
"""A fork server with requests to answer does not sleep, whatever else the machine does."""
MAX_SILENT_POLLS = 30

STOPPED = "waits for its fork server, which something has stopped (SIGSTOP, or a debugger)"
SILENT = "waits for its fork server, which does not answer"


class CheckedForkServer(Protocol):
    """A fork server, as its health check needs it."""

    @property
    def ready(self) -> bool: ...

    @property
    def has_work(self) -> bool:
        """Whether it has requests to answer, or is not ready yet."""

    @property
    def pid(self) -> int | None: ...

    def send_signal(self, number: signal.Signals) -> None: ...

    def report_waiting_orders(self) -> None: ...


class HealthCheck:
    """The health check of one fork server."""

    def __init__(self, server: CheckedForkServer) -> None:
        self.problem: str | None = None
        """Why the fork server makes no progress, in words."""
        self._server = server
        self._stopped = self._silent = self._asleep = 0
        self._timer: asyncio.TimerHandle | None = None

    def start_polling(self) -> None:
        """Poll until the fork server has no work, if that does not happen already."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(POLL_INTERVAL_S, self._poll)

    def reset(self) -> None:
        """The fork server has sent a message, or needs no check."""
        self._stopped = self._silent = self._asleep = 0
        self.problem = None

    def close(self) -> None:
        """Poll no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _poll(self) -> None:
        self._timer = None
        pid = self._server.pid
        if not self._server.has_work or pid is None:
            self.reset()
            return
        self.start_polling()
        try:
            about = processes.stat(pid)
        except OSError:
            return  # no descriptor is left: the next poll tries again
        state = "Z" if about is None else about[0]
        if state in "Tt":
            self._stopped += 1
            self.problem = STOPPED
            self._server.send_signal(signal.SIGCONT)
        elif self._server.ready:
            self._stopped = 0
            self._silent += 1
            self._asleep = self._asleep + 1 if state == "S" else 0
            self.problem = SILENT
        else:
            self.reset()
            return
        is_stuck = self._stopped >= MAX_STOPPED_POLLS or self._asleep >= MAX_ASLEEP_POLLS
        if is_stuck or self._silent >= MAX_SILENT_POLLS:
            log.warning("killing a fork server", pid=pid, reason=self.problem)
            self._server.send_signal(signal.SIGKILL)
        self._server.report_waiting_orders()
