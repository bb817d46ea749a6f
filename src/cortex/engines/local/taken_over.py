"""A supervising process that an earlier operator had, held by a pidfd. Owned by `attempts`.

It answers to nobody here: it is gone when the pidfd becomes readable, and over with its job when the exit record
is there.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import structlog

from cortex.engines.local.ends import Ends
from cortex.engines.local.supervisors import ask_to_end, collect

log = structlog.get_logger()


class TakenOver:
    """All of it happens on the event loop."""

    def __init__(self, pidfd: int, record: Path, ends: Ends, over: Callable[[], None]) -> None:
        """
        Args:
            pidfd: is closed here.
            record: the exit record. One that is there already is not told.
            over: called once, when the process is gone or the record is there.
        """
        self.pidfd = pidfd
        self._record = record
        self._ends = ends
        self._over = over
        asyncio.get_running_loop().add_reader(pidfd, self._on_gone)
        try:
            ends.add(record, self.end)
        except OSError as error:
            log.warning("an exit record cannot be awaited", error=str(error))

    def stop(self) -> None:
        """It ends its job, and then itself."""
        if self.pidfd >= 0:
            ask_to_end(self.pidfd)

    def end(self) -> None:
        """It is over with the job."""
        if self.pidfd >= 0:
            self.close()
            self._over()

    def close(self) -> None:
        """Let go of it; what runs goes on."""
        if self.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
            self._ends.remove(self._record)

    def _on_gone(self) -> None:
        collect(self.pidfd)
        self.end()
