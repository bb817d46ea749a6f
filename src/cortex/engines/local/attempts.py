"""Follows the attempts of the local engine to their ends. Owned by `engine`; fork servers and supervisors
report to it.

Each attempt has a supervisor (`cortex.worker.supervisor.main`), which reports when it has written the
attempt's exit record. The supervisor of an earlier operator is adopted (`adopted`). An attempt without a
valid record of its end is lost: its processes are ended first, and then the loss is reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
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
from cortex.engines.local.adopted import AdoptedSupervisor
from cortex.engines.local.backstop import Backstop
from cortex.engines.local.supervisor import SupervisorHandle
from cortex.engines.local.tracked import TrackedAttempt
from cortex.joblog.folders import JobFolders
from cortex.joblog.watch import FileWatch
from cortex.system.account import Account
from cortex.system.background import Background, in_thread
from cortex.system.oserrors import is_storage
from cortex.worker import processes
from cortex.worker.messages import ExitRecord, Order, Reply

log = structlog.get_logger()

RETRY_S = 1.0
_KILLED = "the supervising process was killed"
_REBOOTED = "the machine restarted while the job ran"
_COPIED = "it ran with another data folder, of which this one is a copy: what became of it there is not known here"


class Attempts:
    """The attempts whose end has not been reported, by job."""

    def __init__(
        self,
        folders: JobFolders,
        free: Callable[[str], bool],
        tidy: Callable[[], Awaitable[None]],
        account: Account | None = None,
    ) -> None:
        """
        Args:
            folders: of the jobs.
            free: gives back what a job has taken; whether another job may be waiting for it.
            tidy: ends processes that fork servers or the operator have inherited from killed supervisors.
            account: the user of the jobs, if that is not the operator's own.
        """
        self.report: Report = lambda _: None
        self._folders = folders
        self._free = free
        self._tidy = tidy
        self._account = account
        self._live: dict[str, TrackedAttempt] = {}
        self._background = Background("the local engine failed")
        self._exit_records = FileWatch("exit records")
        self._backstop = Backstop(lambda: list(self._live.values()), self._background)

    async def close(self) -> None:
        """Forget all attempts; jobs go on."""
        await self._background.close()
        for live in self._live.values():
            self._let_go(live)
        self._live.clear()
        await self._exit_records.close()

    def supervisors(self) -> set[int]:
        """The pids of adopted supervisors.

        Raises:
            OSError: no descriptor is left to read them.
        """
        held = [live.taken_over for live in self._live.values()]
        return {
            processes.pid_of(each.pidfd) for each in held if each is not None and each.pidfd >= 0
        }

    def begin(
        self, attempt: Attempt, grace_s: float, supervisor: SupervisorHandle | None = None
    ) -> None:
        """Follow an attempt that starts now.

        Args:
            supervisor: the attempt's supervisor, if it has one already.
        """
        start_record = self._start_of(attempt)
        self._live[attempt.spec.job_id] = TrackedAttempt(
            attempt, start_record, supervisor, grace_s=grace_s
        )
        self._backstop.watch()

    def wait(self, attempt: Attempt, withdraw: Callable[[Attempt], bool]) -> None:
        """Withdraw the attempt's order at its deadline, if it waits for a fork server until then.

        Args:
            withdraw: takes back an order that no supervisor has received; whether that succeeded.
        """
        live = self._live.get(attempt.spec.job_id)
        if live is None or live.supervisor is not None or attempt.deadline is None:
            return
        left_s = max(0.0, attempt.deadline - time.monotonic())
        loop = asyncio.get_running_loop()
        live.timer = loop.call_later(left_s, self._give_up, live, withdraw)

    async def recover(self, attempt: Attempt, grace_s: float) -> None:
        """Follow an attempt that an earlier operator claimed."""
        live = TrackedAttempt(attempt, self._start_of(attempt), grace_s=grace_s)
        self._live[attempt.spec.job_id] = live
        self._backstop.watch()
        if not await self._take_up(live):
            self._background.run(self._until_told(live))

    def stop(self, job_id: str, withdraw: Callable[[Attempt], bool]) -> None:
        """End an attempt, if the engine has one of this job.

        Args:
            withdraw: takes back an order that no supervisor has received; whether that succeeded.
        """
        live = self._live.get(job_id)
        if live is not None:
            live.stop = True
            live.stop_at = live.stop_at or time.monotonic()
            if withdraw(live.attempt):
                self._settle(live, self._never(live))
            else:
                self._signal(live)

    def waits(self, order: Order, reason: str) -> None:
        """A fork server reports that an order has to wait."""
        live = self._ordered(order.job_id, order.attempt)
        if live is not None and not live.stop:
            self.report(Waits(order.job_id, order.attempt, reason))

    def given(self, supervisor: SupervisorHandle, order: Order) -> None:
        """A fork server reports that a supervisor has received an order."""
        live = self._ordered(order.job_id, order.attempt)
        if live is not None:
            self._cancel(live)
            live.supervisor = supervisor
            if live.stop:
                supervisor.stop()

    def recorded(self, reply: Reply) -> None:
        """A supervisor reports that the job has started."""
        live = self._ordered(reply.job_id, reply.attempt)
        if live is not None:
            self._started(live, reply.start_ns)

    def ended(self, reply: Reply) -> None:
        """A supervisor reports that the exit record is written."""
        live = self._ordered(reply.job_id, reply.attempt)
        if live is None:
            return
        live.supervisor = None
        record = None if reply.record is None else ExitRecord(**reply.record)  # type: ignore[arg-type]  # it was read from JSON
        if record is not None and record.ending != "lost":
            self._conclude_by(live, record)
        else:
            self._background.run(self._conclude(live))

    def refused(self, reply: Reply) -> None:
        """A supervisor reports that it could not begin the attempt."""
        live = self._ordered(reply.job_id, reply.attempt)
        if live is None:
            return
        live.supervisor = None
        self._background.run(
            self._tidy_later()
        )  # the supervisor is killed, and leaves its workspace
        error = OSError(reply.errno, reply.error)
        reason = f"the job's folder cannot be written: {error}"
        if is_storage(error):
            self._settle(live, self._never(live, reason))
        else:
            self._settle(live, self._lost(live, reason))

    def orphaned(self, order: Order, why: str | None) -> None:
        """A fork server reports that the supervisor of an order has exited."""
        live = self._ordered(order.job_id, order.attempt)
        if live is not None:
            live.was_late = live.is_overdue
            live.supervisor, live.why = None, why
            self._background.run(self._conclude(live))

    def not_forked(self, job_id: str, reason: str) -> None:
        """A fork server reports that an order failed for good."""
        live = self._live.get(job_id)
        if live is not None:
            self._settle(live, self._lost(live, reason))

    def held_up(self, job_id: str, reason: str) -> None:
        """A fork server reports that the machine lacks something that an order needs."""
        live = self._live.get(job_id)
        if live is not None:
            self._settle(live, self._never(live, reason))

    def unanswered(self, job_id: str) -> None:
        """A fork server died before it answered: fence the attempt off, unless it has begun."""
        live = self._live.get(job_id)
        if live is not None:
            self._background.run(self._until_told(live))

    def _ordered(self, job_id: str | None, attempt: int) -> TrackedAttempt | None:
        live = self._live.get(job_id or "")
        return live if live is not None and live.attempt.number == attempt else None

    def _started(self, live: TrackedAttempt, start_ns: int) -> None:
        if not live.has_started:
            live.has_started = True
            self.report(Started(live.job_id, live.attempt.number, start_ns))

    def _take_over(self, live: TrackedAttempt, pidfd: int) -> None:
        held = AdoptedSupervisor(
            pidfd, self._exit_of(live), self._exit_records, lambda: self._on_over(live)
        )
        live.taken_over = held
        if live.stop:
            held.stop()
        with contextlib.suppress(OSError):  # the exit of the process reports the end as well, later
            # The record may be older than the watch.
            if records.ended(self._of(live), live.attempt.number).exit is not None:
                held.recorded()

    def _on_over(self, live: TrackedAttempt) -> None:
        live.taken_over = None
        live.was_late = live.is_overdue
        self._background.run(self._conclude(live))

    async def _conclude(self, live: TrackedAttempt) -> None:
        """The supervisor has exited: report how the attempt ended, once its folder can be read."""
        told = False
        while True:
            try:
                gone = records.ended(self._of(live), live.attempt.number)
                if gone.start is None and gone.exit is None:
                    break  # the supervisor was killed, or the disk was full, before any code ran
            except OSError as error:
                if live.stop and told:
                    gone = records.Gone(None, None, rebooted=False)
                else:
                    told = self._unreachable(live, error, told=told)
                    await asyncio.sleep(RETRY_S)
                    continue
            await self._end(live, gone)
            return
        await self._until_told(live)

    async def _until_told(self, live: TrackedAttempt) -> None:
        while not await self._take_up(live):  # noqa: ASYNC110  # the kernel does not report that a moved folder is back
            await asyncio.sleep(RETRY_S)

    async def _take_up(self, live: TrackedAttempt) -> bool:
        """Determine the state of an attempt, and follow it from there; False if its folder cannot be read."""
        try:
            found = await in_thread(records.look, self._of(live), live.attempt, self._account)
        except OSError as error:
            self._unreachable(live, error, told=False)
            return False
        if isinstance(found, records.Fenced):
            self._settle(live, self._never(live))
        elif isinstance(found, records.Alive):
            self._started(live, found.start.start_ns)
            self._take_over(live, found.pidfd)
        else:
            await self._end(live, found)
        return True

    async def _end(self, live: TrackedAttempt, gone: records.Gone) -> None:
        record = gone.exit
        if record is not None and record.ending != "lost":
            self._conclude_by(live, record)
            return
        if gone.start is not None and gone.start.fenced:
            self._settle(live, self._never(live))
            return
        if not gone.copied:
            await self._clean(live)
        if live.was_late and not live.stop:
            start_ns = (gone.start.start_ns if gone.start else 0) or time.time_ns()
            self._settle(live, self._timed_out(live, start_ns))
            return
        if record is not None:
            reason = record.message or _KILLED
        elif gone.copied:
            reason = _COPIED
        elif live.why is not None or gone.why is not None:
            reason = live.why or f"the record of its end is not valid: {gone.why}"
        else:
            reason = _REBOOTED if gone.rebooted else _KILLED
        self._settle(live, self._lost(live, reason))

    async def _tidy_later(self) -> None:
        await asyncio.sleep(RETRY_S)
        # No descriptor or thread is left: the next lost attempt tidies.
        with contextlib.suppress(OSError):
            await self._tidy()

    async def _clean(self, live: TrackedAttempt) -> None:
        while True:
            try:
                await self._tidy()
                await in_thread(leftovers.clean, self._of(live), live.attempt.number)
            except OSError as error:
                job_id = live.job_id
                log.warning("cannot end what is left of a job", job=job_id, error=str(error))
                await asyncio.sleep(RETRY_S)
            else:
                return

    def _conclude_by(self, live: TrackedAttempt, record: ExitRecord) -> None:
        if live.is_forced and live.was_late and record.ending == Ending.EXITED:
            # The supervisor was alive after the deadline, without a record of an end.
            self._settle(live, self._timed_out(live, record.start_ns))
            return
        last = Ended(
            job_id=live.job_id,
            attempt=live.attempt.number,
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
        self._settle(live, last)

    def _timed_out(self, live: TrackedAttempt, start_ns: int) -> Ended:
        """The end of an attempt past its deadline whose supervisor could not record it."""
        message = f"timeout of {live.attempt.spec.timeout} s passed"
        end_ns = max(start_ns, time.time_ns())
        return Ended(
            live.job_id,
            live.attempt.number,
            Ending.TIMED_OUT,
            start_ns,
            end_ns,
            exit_code=-signal.SIGKILL,
            message=message,
            result=None,
            has_result=False,
        )

    def _lost(self, live: TrackedAttempt, reason: str) -> Lost:
        return Lost(live.job_id, live.attempt.number, reason)

    def _never(self, live: TrackedAttempt, held_up_by: str | None = None) -> NeverStarted:
        return NeverStarted(live.job_id, live.attempt.number, held_up_by)

    def _unreachable(self, live: TrackedAttempt, error: OSError, *, told: bool) -> bool:
        if not told:
            reason = f"the job's folder cannot be read: {error}"
            self.report(Unreachable(live.job_id, live.attempt.number, reason))
        return True

    def _settle(self, live: TrackedAttempt, last: Ended | Lost | NeverStarted) -> None:
        if self._live.get(last.job_id) is not live:
            return
        del self._live[last.job_id]
        self._let_go(live)
        freed = self._free(last.job_id)
        self.report(last)
        if freed:
            self.report(CapacityFreed())

    def _give_up(self, live: TrackedAttempt, withdraw: Callable[[Attempt], bool]) -> None:
        if withdraw(live.attempt):
            self._settle(live, self._never(live))

    def _cancel(self, live: TrackedAttempt) -> None:
        if live.timer is not None:
            live.timer.cancel()

    def _signal(self, live: TrackedAttempt) -> None:
        if live.supervisor is not None:
            live.supervisor.stop()
        elif live.taken_over is not None:
            live.taken_over.stop()

    def _let_go(self, live: TrackedAttempt) -> None:
        self._cancel(live)
        if live.taken_over is not None:
            live.taken_over.close()
            live.taken_over = None

    def _start_of(self, attempt: Attempt) -> Path:
        return self._folders.start_record(attempt.spec.job_id, attempt.number)

    def _exit_of(self, live: TrackedAttempt) -> Path:
        return self._folders.exit_record(live.job_id, live.attempt.number)

    def _of(self, live: TrackedAttempt) -> Path:
        return self._folders.folder(live.job_id)
