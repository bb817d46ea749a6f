"""A supervising process that an earlier operator had, held by a pidfd. Owned by `attempts`.

It answers to nobody here: it is gone when the pidfd becomes readable, and over with its job when the exit record
is there and the job's processes are not: a job can make such a record itself.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import structlog

from cortex.engines.local import leftovers
from cortex.engines.local.exit_watch import ExitRecordWatch
from cortex.engines.local.supervisor import ask_to_end, collect
from cortex.worker import processes

log = structlog.get_logger()

LOOK_AGAIN_S = 0.5


class AdoptedSupervisor:
    """All of it happens on the event loop."""

    def __init__(
        self, pidfd: int, record: Path, ends: ExitRecordWatch, over: Callable[[], None]
    ) -> None:
        """
        Args:
            pidfd: is closed here.
            record: the exit record. One that is there already is not told.
            over: called once, when the process is gone, or the record is there and the job is not.
        """
        self.pidfd = pidfd
        self._record = record
        self._ends = ends
        self._over = over
        self._again: asyncio.TimerHandle | None = None
        asyncio.get_running_loop().add_reader(pidfd, self._on_gone)
        try:
            ends.add(record, self.recorded)
        except OSError as error:
            log.warning("an exit record cannot be awaited", error=str(error))

    def stop(self) -> None:
        """It ends its job, and then itself."""
        if self.pidfd >= 0:
            ask_to_end(self.pidfd)

    def recorded(self) -> None:
        """The exit record is there."""
        if self._again is not None:
            self._again.cancel()
        if self.pidfd < 0:
            return
        if self._has_job():
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(LOOK_AGAIN_S, self.recorded)
        else:
            self._end()

    def close(self) -> None:
        """Let go of it; what runs goes on."""
        if self.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
            self._ends.remove(self._record)
        if self._again is not None:
            self._again.cancel()

    def _has_job(self) -> bool:
        try:
            pid = processes.pid_of(self.pidfd)
            return leftovers.runs_below(pid, self._record.parent.name)
        except OSError:
            return True  # it cannot be told now

    def _on_gone(self) -> None:
        collect(self.pidfd)
        self._end()

    def _end(self) -> None:
        self.close()
        self._over()
