"""The supervisor of an earlier operator, watched through a pidfd. Owned by `attempts`.

It reports to the earlier operator, if that still runs. Here it has exited when the pidfd becomes
readable. Its job has ended when the exit record exists and no process of the job does: a job can create
such a record itself. The record counts, because a supervisor whose operator hangs does not exit after
its job.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import structlog

from cortex.engines.local import leftovers
from cortex.engines.local.supervisor import ask_to_end, collect
from cortex.joblog.watch import FileWatch
from cortex.worker import processes

log = structlog.get_logger()

LOOK_AGAIN_S = 0.5


class AdoptedSupervisor:
    """All of it happens on the event loop."""

    def __init__(
        self, pidfd: int, record: Path, watch: FileWatch, over: Callable[[], None]
    ) -> None:
        """
        Args:
            pidfd: closed by this object.
            record: the exit record. One that exists already is not reported.
            over: called once, when the process has exited, or the record exists and no process of the
                job does.
        """
        self.pidfd = pidfd
        self._record = record
        self._watch = watch
        self._over = over
        self._again: asyncio.TimerHandle | None = None
        asyncio.get_running_loop().add_reader(pidfd, self._on_gone)
        try:
            watch.watch_appearance(record, self.recorded)
        except OSError as error:  # the exit of the process reports the end as well
            log.warning("cannot watch an exit record", error=str(error))

    def stop(self) -> None:
        """It ends its job, and then itself."""
        if self.pidfd >= 0:
            ask_to_end(self.pidfd)

    def recorded(self) -> None:
        """The exit record exists."""
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
            self._watch.remove(self._record, self.recorded)
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
