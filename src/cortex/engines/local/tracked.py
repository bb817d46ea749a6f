"""The state that the local engine has of an attempt until it reports the end. Owned by
`attempts`."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from cortex.engines.base import Attempt, Ended, Ending, Lost, NeverStarted
from cortex.engines.local.supervisor import AdoptedSupervisor, SupervisorHandle
from cortex.worker.messages import ExitRecord


@dataclass(eq=False)
class TrackedAttempt:
    """An attempt whose end has not been reported."""

    attempt: Attempt
    start_record: Path
    supervisor: SupervisorHandle | None = None
    adopted: AdoptedSupervisor | None = None
    """The attempt's supervisor, if an earlier operator started it."""
    grace_s: float = 0.0
    is_stopping: bool = False
    stop_requested_at: float | None = None
    has_started: bool = False
    """Whether the start was reported."""
    stopped_polls: int = 0
    is_force_killed: bool = False
    protocol_error: str | None = None
    """Why the engine killed the supervisor, if it did: the reason of the loss."""
    was_overdue: bool = False
    """Whether the supervisor was alive at the deadline, without an exit record."""
    timer: asyncio.TimerHandle | None = None
    """Ends the attempt at its deadline, until a supervisor does that."""

    @property
    def job_id(self) -> str:
        return self.attempt.spec.job_id

    @property
    def pidfd(self) -> int:
        """The supervisor's; negative while there is no supervisor."""
        current = self.supervisor or self.adopted
        return -1 if current is None else current.pidfd

    @property
    def has_begun(self) -> bool:
        """Whether a start record exists. The supervisor may not have reported it: its job can stop
        it at once."""
        return self.has_started or os.path.lexists(self.start_record)

    @property
    def must_end_by(self) -> float | None:
        """When the attempt has to be over, its grace included, by the monotonic clock."""
        ends = [at for at in (self.attempt.deadline, self.stop_requested_at) if at is not None]
        return min(ends) + self.grace_s if ends else None

    @property
    def is_overdue(self) -> bool:
        """Whether the deadline passed before the supervisor exited; if it has not, before now."""
        deadline = self.attempt.deadline
        exited_at = None if self.supervisor is None else self.supervisor.exited_at
        return deadline is not None and (exited_at or time.monotonic()) >= deadline

    def ended(self, record: ExitRecord) -> Ended:
        """The end of the attempt as its supervisor recorded it."""
        return Ended(
            job_id=self.job_id,
            attempt=self.attempt.number,
            ending=Ending(record.ending),
            start_ns=record.start_ns,
            end_ns=record.end_ns,
            exit_code=record.exit_code,
            message=record.message,
            result=record.result,  # type: ignore[arg-type]  # it was read from JSON
            has_result=record.has_result,
            measures=tuple(record.measures),
            hints=tuple(map(str, record.hints)),
        )

    def timed_out(self, start_ns: int) -> Ended:
        """The end of an attempt past its deadline whose supervisor could not record it."""
        message = f"timeout of {self.attempt.spec.timeout} s passed"
        end_ns = max(start_ns, time.time_ns())
        return Ended(
            self.job_id,
            self.attempt.number,
            Ending.TIMED_OUT,
            start_ns,
            end_ns,
            exit_code=-signal.SIGKILL,
            message=message,
            result=None,
            has_result=False,
        )

    def lost(self, reason: str) -> Lost:
        """The loss of the attempt."""
        return Lost(self.job_id, self.attempt.number, reason)

    def never_started(self, blocked_by: str | None = None) -> NeverStarted:
        """The end of an attempt of which no code ran.

        Args:
            blocked_by: what the machine lacked, if that is the reason.
        """
        return NeverStarted(self.job_id, self.attempt.number, blocked_by)
