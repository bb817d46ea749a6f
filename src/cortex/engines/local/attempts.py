"""Follows the attempts of the local engine to their ends. Owned by `engine`; fork servers and
supervisors report to it.

Each attempt has a supervisor (`cortex.worker.supervisor.main`), which reports when it has written
the attempt's exit record. The supervisor of an earlier operator is adopted (`AdoptedSupervisor`).
An attempt without a valid exit record is lost: the engine ends its processes, and then reports the
loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from cortex.engines.base import (
    Attempt,
    CapacityFreed,
    Ended,
    Ending,
    Lost,
    NeverStarted,
    Report,
    Started,
    Unreachable,
    Waits,
)
from cortex.engines.local import leftovers, records
from cortex.engines.local.backstop import Backstop
from cortex.engines.local.supervisor import AdoptedSupervisor, SupervisorHandle
from cortex.engines.local.tracked import TrackedAttempt
from cortex.joblog.folders import JobFolders
from cortex.joblog.watch import FileWatch
from cortex.system.account import Account
from cortex.system.background import Background, in_thread, retrying
from cortex.system.oserrors import is_storage
from cortex.worker import processes
from cortex.worker.messages import ExitRecord, Order, Reply

log = structlog.get_logger()

RETRY_DELAY_S = 1.0
_KILLED = "the supervisor was killed"
_REBOOTED = "the machine restarted while the job ran"
_COPIED = (
    "it ran with another data folder, of which this one is a copy; "
    "its outcome there is unknown here"
)


class Attempts:
    """The attempts whose end has not been reported, by job."""

    def __init__(
        self,
        folders: JobFolders,
        release: Callable[[str], bool],
        end_leftovers: Callable[[], Awaitable[None]],
        account: Account | None = None,
    ) -> None:
        """
        Args:
            folders: of the jobs.
            release: releases the capacity of a job; whether another job may wait for it.
            end_leftovers: ends the processes that fork servers or the operator have inherited from
                killed supervisors.
            account: the user of the jobs, if that is not the operator's own.
        """
        self.report: Report = lambda _: None
        self._folders = folders
        self._release = release
        self._end_inherited = end_leftovers
        self._account = account
        self._tracked: dict[str, TrackedAttempt] = {}
        self._background = Background("the local engine failed")
        self._exit_records = FileWatch("exit records")
        self._backstop = Backstop(lambda: list(self._tracked.values()), self._background)

    async def close(self) -> None:
        """Forget all attempts; jobs go on."""
        await self._background.close()
        for tracked in self._tracked.values():
            self._detach(tracked)
        self._tracked.clear()
        await self._exit_records.close()

    def supervisors(self) -> set[int]:
        """The pids of adopted supervisors.

        Raises:
            OSError: no descriptor is left to read them.
        """
        adopted = [tracked.adopted for tracked in self._tracked.values()]
        return {
            processes.pid_of(each.pidfd) for each in adopted if each is not None and each.pidfd >= 0
        }

    def track(
        self, attempt: Attempt, grace_s: float, supervisor: SupervisorHandle | None = None
    ) -> None:
        """Track an attempt that starts now.

        Args:
            supervisor: the attempt's supervisor, if it has one already.
        """
        start_record = self._start_record_of(attempt)
        self._tracked[attempt.spec.job_id] = TrackedAttempt(
            attempt, start_record, supervisor, grace_s=grace_s
        )
        self._backstop.start_polling()

    def withdraw_at_deadline(self, attempt: Attempt, withdraw: Callable[[Attempt], bool]) -> None:
        """Withdraw the attempt's order at the deadline, if no supervisor has received it by then.

        Args:
            withdraw: withdraws an order that no supervisor has received; whether that succeeded.
        """
        tracked = self._tracked.get(attempt.spec.job_id)
        if tracked is None or tracked.supervisor is not None or attempt.deadline is None:
            return
        left_s = max(0.0, attempt.deadline - time.monotonic())
        loop = asyncio.get_running_loop()
        tracked.timer = loop.call_later(left_s, self._on_deadline, tracked, withdraw)

    async def recover(self, attempt: Attempt, grace_s: float) -> None:
        """Track an attempt that an earlier operator claimed."""
        tracked = TrackedAttempt(attempt, self._start_record_of(attempt), grace_s=grace_s)
        self._tracked[attempt.spec.job_id] = tracked
        self._backstop.start_polling()
        if not await self._inspect(tracked):
            self._background.run(self._inspect_until_readable(tracked))

    def stop(self, job_id: str, withdraw: Callable[[Attempt], bool]) -> None:
        """End an attempt, if the engine has one of this job.

        Args:
            withdraw: withdraws an order that no supervisor has received; whether that succeeded.
        """
        tracked = self._tracked.get(job_id)
        if tracked is not None:
            tracked.is_stopping = True
            tracked.stop_requested_at = tracked.stop_requested_at or time.monotonic()
            if withdraw(tracked.attempt):
                self._finish(tracked, tracked.never_started())
            else:
                self._stop_supervisor(tracked)

    def on_order_waits(self, order: Order, reason: str) -> None:
        """A fork server reports that an order has to wait."""
        tracked = self._of_order(order.job_id, order.attempt)
        if tracked is not None and not tracked.is_stopping:
            self.report(Waits(order.job_id, order.attempt, reason))

    def on_order_received(self, supervisor: SupervisorHandle, order: Order) -> None:
        """A fork server reports that a supervisor has received an order."""
        tracked = self._of_order(order.job_id, order.attempt)
        if tracked is not None:
            self._cancel_timer(tracked)
            tracked.supervisor = supervisor
            if tracked.is_stopping:
                supervisor.stop()

    def on_start_recorded(self, reply: Reply) -> None:
        """A supervisor reports that the job has started."""
        tracked = self._of_order(reply.job_id, reply.attempt)
        if tracked is not None:
            self._report_started(tracked, reply.start_ns)

    def on_exit_recorded(self, reply: Reply) -> None:
        """A supervisor reports that the exit record is written."""
        tracked = self._of_order(reply.job_id, reply.attempt)
        if tracked is None:
            return
        tracked.supervisor = None
        record = None if reply.record is None else ExitRecord(**reply.record)  # type: ignore[arg-type]  # it was read from JSON
        if record is not None and record.ending != "lost":
            self._finish_by_record(tracked, record)
        else:
            self._background.run(self._report_end(tracked))

    def on_order_refused(self, reply: Reply) -> None:
        """A supervisor reports that it could not begin the attempt."""
        tracked = self._of_order(reply.job_id, reply.attempt)
        if tracked is None:
            return
        tracked.supervisor = None
        # The engine kills the supervisor, which leaves its workspace.
        self._background.run(self._end_inherited_later())
        error = OSError(reply.errno, reply.error)
        reason = f"the job's folder cannot be written: {error}"
        if is_storage(error):
            self._finish(tracked, tracked.never_started(reason))
        else:
            self._finish(tracked, tracked.lost(reason))

    def on_order_orphaned(self, order: Order, protocol_error: str | None) -> None:
        """A fork server reports that the supervisor of an order has exited."""
        tracked = self._of_order(order.job_id, order.attempt)
        if tracked is not None:
            tracked.was_overdue = tracked.is_overdue
            tracked.supervisor, tracked.protocol_error = None, protocol_error
            self._background.run(self._report_end(tracked))

    def on_order_failed(self, job_id: str, reason: str) -> None:
        """A fork server reports that an order failed for good."""
        tracked = self._tracked.get(job_id)
        if tracked is not None:
            self._finish(tracked, tracked.lost(reason))

    def on_order_blocked(self, job_id: str, reason: str) -> None:
        """A fork server reports that the machine lacks something that an order needs."""
        tracked = self._tracked.get(job_id)
        if tracked is not None:
            self._finish(tracked, tracked.never_started(reason))

    def on_order_unanswered(self, job_id: str) -> None:
        """A fork server died before it answered: fence the attempt off, unless it has begun."""
        tracked = self._tracked.get(job_id)
        if tracked is not None:
            self._background.run(self._inspect_until_readable(tracked))

    def _of_order(self, job_id: str | None, attempt: int) -> TrackedAttempt | None:
        tracked = self._tracked.get(job_id or "")
        return tracked if tracked is not None and tracked.attempt.number == attempt else None

    def _report_started(self, tracked: TrackedAttempt, start_ns: int) -> None:
        if not tracked.has_started:
            tracked.has_started = True
            self.report(Started(tracked.job_id, tracked.attempt.number, start_ns))

    def _adopt(self, tracked: TrackedAttempt, pidfd: int) -> None:
        adopted = AdoptedSupervisor(
            pidfd,
            self._exit_record_of(tracked),
            self._exit_records,
            lambda: self._on_adopted_end(tracked),
        )
        tracked.adopted = adopted
        if tracked.is_stopping:
            adopted.stop()
        with contextlib.suppress(OSError):  # the exit of the process reports the end as well, later
            # The record may be older than the watch.
            if records.read_exit(self._folder_of(tracked), tracked.attempt.number).exit is not None:
                adopted.on_exit_record()

    def _on_adopted_end(self, tracked: TrackedAttempt) -> None:
        tracked.adopted = None
        tracked.was_overdue = tracked.is_overdue
        self._background.run(self._report_end(tracked))

    async def _report_end(self, tracked: TrackedAttempt) -> None:
        """The supervisor has exited: report how the attempt ended, once its folder can be read."""
        is_reported = False
        while True:
            try:
                exited = records.read_exit(self._folder_of(tracked), tracked.attempt.number)
                if exited.start is None and exited.exit is None:
                    break  # the supervisor was killed, or the disk was full, before any code ran
            except OSError as error:
                if tracked.is_stopping and is_reported:
                    exited = records.Exited(None, None, rebooted=False)
                else:
                    is_reported = self._report_unreachable(tracked, error, is_reported=is_reported)
                    await asyncio.sleep(RETRY_DELAY_S)
                    continue
            await self._finish_exited(tracked, exited)
            return
        await self._inspect_until_readable(tracked)

    async def _inspect_until_readable(self, tracked: TrackedAttempt) -> None:
        while not await self._inspect(tracked):  # noqa: ASYNC110  # the kernel does not report that a moved folder is back
            await asyncio.sleep(RETRY_DELAY_S)

    async def _inspect(self, tracked: TrackedAttempt) -> bool:
        """Determine the state of an attempt, and track it; False if its folder cannot be read."""
        try:
            found = await in_thread(
                records.inspect_attempt, self._folder_of(tracked), tracked.attempt, self._account
            )
        except OSError as error:
            self._report_unreachable(tracked, error, is_reported=False)
            return False
        if isinstance(found, records.Fenced):
            self._finish(tracked, tracked.never_started())
        elif isinstance(found, records.Alive):
            self._report_started(tracked, found.start.start_ns)
            self._adopt(tracked, found.pidfd)
        else:
            await self._finish_exited(tracked, found)
        return True

    async def _finish_exited(self, tracked: TrackedAttempt, exited: records.Exited) -> None:
        record = exited.exit
        if record is not None and record.ending != "lost":
            self._finish_by_record(tracked, record)
            return
        if exited.start is not None and exited.start.fenced:
            self._finish(tracked, tracked.never_started())
            return
        if not exited.copied:
            await self._end_leftovers(tracked)
        if tracked.was_overdue and not tracked.is_stopping:
            start_ns = (exited.start.start_ns if exited.start else 0) or time.time_ns()
            self._finish(tracked, tracked.timed_out(start_ns))
            return
        if record is not None:
            reason = record.message or _KILLED
        elif exited.copied:
            reason = _COPIED
        elif tracked.protocol_error is not None or exited.invalid is not None:
            reason = tracked.protocol_error or f"its exit record is not valid: {exited.invalid}"
        else:
            reason = _REBOOTED if exited.rebooted else _KILLED
        self._finish(tracked, tracked.lost(reason))

    async def _end_inherited_later(self) -> None:
        await asyncio.sleep(RETRY_DELAY_S)
        # If no descriptor or thread is left now, the next lost attempt does it.
        with contextlib.suppress(OSError):
            await self._end_inherited()

    async def _end_leftovers(self, tracked: TrackedAttempt) -> None:
        async def end() -> None:
            await self._end_inherited()
            await in_thread(
                leftovers.end_leftovers, self._folder_of(tracked), tracked.attempt.number
            )

        await retrying(
            end,
            (OSError,),
            delay_s=RETRY_DELAY_S,
            warning="cannot end the processes of a lost attempt",
            job=tracked.job_id,
        )

    def _finish_by_record(self, tracked: TrackedAttempt, record: ExitRecord) -> None:
        if tracked.is_force_killed and tracked.was_overdue and record.ending == Ending.EXITED:
            # The supervisor was alive after the deadline, without a record of an end.
            self._finish(tracked, tracked.timed_out(record.start_ns))
            return
        self._finish(tracked, tracked.ended(record))

    def _report_unreachable(
        self, tracked: TrackedAttempt, error: OSError, *, is_reported: bool
    ) -> bool:
        if not is_reported:
            reason = f"the job's folder cannot be read: {error}"
            self.report(Unreachable(tracked.job_id, tracked.attempt.number, reason))
        return True

    def _finish(self, tracked: TrackedAttempt, last: Ended | Lost | NeverStarted) -> None:
        if self._tracked.get(last.job_id) is not tracked:
            return
        del self._tracked[last.job_id]
        self._detach(tracked)
        freed = self._release(last.job_id)
        self.report(last)
        if freed:
            self.report(CapacityFreed())

    def _on_deadline(self, tracked: TrackedAttempt, withdraw: Callable[[Attempt], bool]) -> None:
        if withdraw(tracked.attempt):
            self._finish(tracked, tracked.never_started())

    def _cancel_timer(self, tracked: TrackedAttempt) -> None:
        if tracked.timer is not None:
            tracked.timer.cancel()

    def _stop_supervisor(self, tracked: TrackedAttempt) -> None:
        if tracked.supervisor is not None:
            tracked.supervisor.stop()
        elif tracked.adopted is not None:
            tracked.adopted.stop()

    def _detach(self, tracked: TrackedAttempt) -> None:
        self._cancel_timer(tracked)
        if tracked.adopted is not None:
            tracked.adopted.close()
            tracked.adopted = None

    def _start_record_of(self, attempt: Attempt) -> Path:
        return self._folders.start_record(attempt.spec.job_id, attempt.number)

    def _exit_record_of(self, tracked: TrackedAttempt) -> Path:
        return self._folders.exit_record(tracked.job_id, tracked.attempt.number)

    def _folder_of(self, tracked: TrackedAttempt) -> Path:
        return self._folders.folder(tracked.job_id)
