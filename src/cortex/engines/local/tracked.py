"""What the local engine keeps in memory of an attempt whose end has not been reported. Owned by `attempts`."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from cortex.engines.base import Attempt
from cortex.engines.local.adopted import AdoptedSupervisor
from cortex.engines.local.supervisor import SupervisorHandle


@dataclass(eq=False)
class TrackedAttempt:
    """One of them."""

    attempt: Attempt
    start_record: Path
    supervisor: SupervisorHandle | None = None
    taken_over: AdoptedSupervisor | None = None
    grace_s: float = 0.0
    stop: bool = False
    stop_at: float | None = None
    has_started: bool = False
    stopped_looks: int = 0
    is_forced: bool = False
    why: str | None = None
    """Why it is lost, where its supervising process was given up."""
    was_late: bool = False
    """Whether its supervising process was there at its deadline, without a record of an end."""
    # Of the deadline, until a supervising process keeps that.
    timer: asyncio.TimerHandle | None = None

    @property
    def job_id(self) -> str:
        return self.attempt.spec.job_id

    @property
    def pidfd(self) -> int:
        held = self.supervisor or self.taken_over
        return -1 if held is None else held.pidfd

    @property
    def has_begun(self) -> bool:
        """Also where its supervising process has not told of it: the job may have stopped that at once."""
        return self.has_started or os.path.lexists(self.start_record)

    @property
    def over_at(self) -> float | None:
        asked = [at for at in (self.attempt.deadline, self.stop_at) if at is not None]
        return min(asked) + self.grace_s if asked else None

    @property
    def is_overdue(self) -> bool:
        deadline = self.attempt.deadline
        ended = None if self.supervisor is None else self.supervisor.gone_at
        return deadline is not None and (ended or time.monotonic()) >= deadline
