"""What the dispatcher keeps in memory of a job in progress, and what an observed end means."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from cortex.engines.base import Ended, Ending, Version
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import Event
from cortex.spec.times import now_ns
from cortex.store import Facts


@dataclass(slots=True)
class LiveJob:
    """A job in progress."""

    record: JobRecord
    version: Version | None = None
    stop_wanted: bool = False
    unreachable: str | None = None
    held_up_by: str | None = None  # what the machine lacks right now
    waits_for: str | None = None  # of one that was ordered from the engine, and has not started
    deadline: float | None = None  # by the monotonic clock, also of the engine's processes
    timer: asyncio.TimerHandle | None = None  # of the deadline, while it waits
    awaited: asyncio.Event | None = None  # made when somebody waits for a change: few do

    async def change(self) -> None:
        """Return when it changes in any way that shows."""
        if self.awaited is None:
            self.awaited = asyncio.Event()
        await self.awaited.wait()

    def changed(self) -> None:
        """It has changed: tell those that wait for that."""
        if self.awaited is not None:
            self.awaited.set()
            self.awaited = None

    @property
    def fruitless(self) -> int:
        """Attempts that came to nothing before any code ran."""
        return self.record.attempt - self.record.losses

    @property
    def is_overdue(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def ending(message: str) -> Facts:
    """The facts of an ending without a worker."""
    return {
        "start_ns": None,
        "end_ns": now_ns(),
        "message": message,
        "exit_code": None,
        "result": None,
    }


def meaning(seen: Ended) -> tuple[Event, str | None]:
    """The event that an observed end is, and the words for it."""
    match seen.ending:
        case Ending.EXITED:
            return (Event.SUCCEED if seen.exit_code == 0 else Event.FAIL), seen.message
        case Ending.OUT_OF_MEMORY:
            return Event.OUT_OF_MEMORY, seen.message
        case Ending.TIMED_OUT:
            return Event.TIME_OUT, seen.message
        case Ending.STOPPED:
            # The store knows what its user wants: a job that was stopped is shown so whatever the
            # event. Only one that nobody stopped gets here with anything to say.
            return Event.LOSE, "something other than the operator stopped its supervising process"
