"""Sees that jobs come to their ends where they have kept their supervising processes from that: a job can stop or trace
a process of its own user. Owned by `attempts`.

A supervising process that is stopped is let go on. Where a job should be over, by its deadline or because somebody
stops it, and its grace has passed as well, it is ended here, and its supervising process with it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from cortex.engines.local.supervisor import signal_to
from cortex.system.background import Background, in_thread
from cortex.worker import processes

log = structlog.get_logger()

LOOK_S = 2.0
LATE_S = 2.0
"""Beyond the grace, for a supervising process that is stopped."""
AWAKE_S = 60.0
"""The same for one that runs: it has times of its own, as for what a job has left running."""
MOST_STOPPED = 3  # looks at one that has not begun: then another process is to have its order


class Watched(Protocol):
    """An attempt."""

    stopped_looks: int
    is_forced: bool
    """Whether it is ended here, or was."""

    @property
    def job_id(self) -> str: ...

    @property
    def pidfd(self) -> int:
        """Of its supervising process; negative where that has not got it yet, or is gone."""

    @property
    def over_at(self) -> float | None:
        """When it has to be over, its grace included, by the monotonic clock."""

    @property
    def has_begun(self) -> bool: ...


class Backstop:
    """While there are attempts, it looks at their supervising processes now and then."""

    def __init__(self, attempts: Callable[[], list[Watched]], background: Background) -> None:
        self._attempts = attempts
        self._background = background
        self._is_on = False

    def watch(self) -> None:
        """There are attempts."""
        if not self._is_on:
            self._is_on = True
            self._background.run(self._run())

    async def _run(self) -> None:
        try:
            while self._attempts():
                await asyncio.sleep(LOOK_S)
                await self._look()
        finally:
            self._is_on = False

    async def _look(self) -> None:
        try:
            pids = {each: processes.pid_of(each.pidfd) for each in self._there()}
            stopped = await in_thread(_stopped, list(pids.values()))
        except OSError:
            return  # for want of descriptors or threads: the next look comes
        for each in self._there():
            self._judge(each, is_stopped=pids.get(each) in stopped)

    def _there(self) -> list[Watched]:
        return [each for each in self._attempts() if each.pidfd >= 0 and not each.is_forced]

    def _judge(self, each: Watched, *, is_stopped: bool) -> None:
        each.stopped_looks = each.stopped_looks + 1 if is_stopped else 0
        late_s = 0.0 if each.over_at is None else time.monotonic() - each.over_at
        if late_s >= (LATE_S if is_stopped else AWAKE_S):
            self._background.run(self._force(each, is_stopped=is_stopped))
        elif is_stopped and not each.has_begun and each.stopped_looks > MOST_STOPPED:
            signal_to(each.pidfd, signal.SIGKILL)
        elif is_stopped:
            signal_to(each.pidfd, signal.SIGCONT)

    async def _force(self, each: Watched, *, is_stopped: bool) -> None:
        try:
            pidfd = os.dup(each.pidfd)  # the other one is closed as soon as the process is gone
        except OSError:
            return
        try:
            # One that runs and has nothing below it has ended its job: its record waits for room on the disk, say.
            if is_stopped or await in_thread(processes.has_descendants, pidfd):
                log.warning("a job is ended, for its supervisor does not do it", job=each.job_id)
                each.is_forced = True
                await in_thread(processes.kill_with_descendants, pidfd)
        except OSError as error:
            each.is_forced = False
            log.warning("a job cannot be ended", job=each.job_id, error=str(error))
        finally:
            os.close(pidfd)


def _stopped(pids: list[int]) -> set[int]:
    """Those of these processes that are stopped, or traced."""
    found = set()
    for pid in pids:
        about = processes.stat(pid)
        if about is not None and about[0] in "Tt":
            found.add(pid)
    return found
