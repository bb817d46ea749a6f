"""Ends jobs whose supervisors cannot: a job can stop or trace a process of its own user. Owned by
`attempts`.

The backstop polls the supervisors of all attempts. It sends SIGCONT to a stopped supervisor. Once a
job's deadline or stop and its grace have passed, it kills the job and its supervisor.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from cortex.engines.local.supervisor import send_signals
from cortex.system.background import Background, in_thread
from cortex.worker import processes

log = structlog.get_logger()

POLL_INTERVAL_S = 2.0
STOPPED_OVERDUE_S = 2.0
"""The time beyond the grace that a stopped supervisor gets."""
RUNNING_OVERDUE_S = 60.0
"""The time beyond the grace that a running supervisor gets. It needs time of its own, for example
to end the processes that a job left."""
MAX_STOPPED_POLLS = 3
"""A supervisor that is stopped in more polls than this, and has not begun, is killed: another
process then gets its order."""


class SupervisedAttempt(Protocol):
    """An attempt, as the backstop needs it."""

    stopped_polls: int
    """The number of polls in a row that found the supervisor stopped."""
    is_force_killed: bool
    """Whether the backstop kills the attempt, or has killed it."""

    @property
    def job_id(self) -> str: ...

    @property
    def pidfd(self) -> int:
        """The supervisor's; negative before a supervisor has the order, and after its exit."""

    @property
    def must_end_by(self) -> float | None:
        """When the attempt has to be over, its grace included, by the monotonic clock."""

    @property
    def has_begun(self) -> bool: ...


class Backstop:
    """Polls the supervisors of attempts while there are attempts."""

    def __init__(
        self, attempts: Callable[[], list[SupervisedAttempt]], background: Background
    ) -> None:
        self._attempts = attempts
        self._background = background
        self._is_polling = False

    def start_polling(self) -> None:
        """Poll until there are no attempts, if that does not happen already."""
        if not self._is_polling:
            self._is_polling = True
            self._background.run(self._run())

    async def _run(self) -> None:
        try:
            while self._attempts():
                await asyncio.sleep(POLL_INTERVAL_S)
                await self._poll()
        finally:
            self._is_polling = False

    async def _poll(self) -> None:
        try:
            pids = {each: processes.pid_of(each.pidfd) for each in self._supervised()}
            stopped = await in_thread(_stopped, list(pids.values()))
        except OSError:
            return  # no descriptor or thread is left: the next poll tries again
        for each in self._supervised():
            self._judge(each, is_stopped=pids.get(each) in stopped)

    def _supervised(self) -> list[SupervisedAttempt]:
        return [each for each in self._attempts() if each.pidfd >= 0 and not each.is_force_killed]

    def _judge(self, each: SupervisedAttempt, *, is_stopped: bool) -> None:
        each.stopped_polls = each.stopped_polls + 1 if is_stopped else 0
        overdue_s = 0.0 if each.must_end_by is None else time.monotonic() - each.must_end_by
        if overdue_s >= (STOPPED_OVERDUE_S if is_stopped else RUNNING_OVERDUE_S):
            self._background.run(self._force_kill(each, is_stopped=is_stopped))
        elif is_stopped and not each.has_begun and each.stopped_polls > MAX_STOPPED_POLLS:
            send_signals(each.pidfd, signal.SIGKILL)
        elif is_stopped:
            send_signals(each.pidfd, signal.SIGCONT)

    async def _force_kill(self, each: SupervisedAttempt, *, is_stopped: bool) -> None:
        try:
            pidfd = os.dup(
                each.pidfd
            )  # the attempt's is closed as soon as the supervisor has exited
        except OSError:
            return
        try:
            # A running supervisor without descendants has ended its job: its record may wait for
            # room on the disk.
            if is_stopped or await in_thread(processes.has_descendants, pidfd):
                log.warning("killing a job that its supervisor does not end", job=each.job_id)
                each.is_force_killed = True
                await in_thread(processes.kill_with_descendants, pidfd)
        except OSError as error:
            each.is_force_killed = False
            log.warning("cannot kill a job", job=each.job_id, error=str(error))
        finally:
            os.close(pidfd)


def _stopped(pids: list[int]) -> set[int]:
    """The subset of these processes that are stopped or traced."""
    found = set()
    for pid in pids:
        about = processes.stat(pid)
        if about is not None and about[0] in "Tt":
            found.add(pid)
    return found
