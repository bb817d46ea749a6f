"""The engine protocol on one machine. Called by the dispatcher (and by `tests/engines`).

For each attempt there is a supervisor (`cortex.worker.supervisor`), held here by a pidfd: when that
becomes readable the supervisor is gone, and its exit record says what became of the attempt. Whatever
cannot be told so is cleared up first and then reported as lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

import cortex
from cortex.engines.base import (
    Attempt,
    Capabilities,
    Capacity,
    CapacityFreed,
    Ended,
    Ending,
    Lost,
    NeverStarted,
    Report,
    Started,
    Unreachable,
    Version,
)
from cortex.engines.local import limits, records
from cortex.engines.local.capacity import Ledger, detect
from cortex.engines.local.forkservers import ForkServers
from cortex.errors import StartupError
from cortex.spec.api import Compute
from cortex.worker.messages import ExitRecord, Order, Reply

RETRY_S = 1.0
_KILLED = "the supervising process was killed"
_REBOOTED = "the machine restarted while the job ran"


@dataclass
class _Live:
    """An attempt whose end has not been reported."""

    attempt: Attempt
    pidfd: int | None = None
    stop: bool = False
    started: bool = False


class LocalEngine:
    """Runs jobs as process trees of this machine, below `root`: a folder for each."""

    def __init__(
        self,
        root: Path,
        total: Capacity | None = None,
        grace_s: float = 10.0,
        memory_limit: str | None = None,
    ) -> None:
        self._root = root.absolute()
        self._total = total
        self._grace_s = grace_s
        self._memory_limit = memory_limit
        self._ledger = Ledger(total or Capacity(0, 0, 0))
        self._limits = limits.watchdog(self._root)
        self._live: dict[str, _Live] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._report: Report = lambda _: None
        self._import_dir = self._root / ".import"
        self._servers = ForkServers(self, self._import_dir)
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("local", self._ledger.total, self._limits.method)

    async def open(self, report: Report) -> None:
        self._report = report
        if not sys.platform.startswith("linux"):
            raise StartupError(f"the local engine needs Linux, this is {sys.platform}")
        try:
            os.close(os.pidfd_open(os.getpid()))
        except OSError as error:
            raise StartupError(
                f"the local engine needs pidfd_open, Linux 5.3 or later: {error}"
            ) from error
        await asyncio.to_thread(self._prepare)

    async def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._servers.close()
        for live in self._live.values():
            self._let_go(live)
        self._live.clear()

    def refusal(self, compute: Compute) -> str | None:
        return self._ledger.refusal(compute)

    def reserve(self, job_id: str, compute: Compute) -> str | None:
        return self._ledger.take(job_id, compute)

    def release(self, job_id: str) -> None:
        if self._ledger.release(job_id):
            self._report(CapacityFreed())

    def claim(self, job_id: str, attempt: int) -> str:
        # From here on a folder that is missing is one that cannot be asked, not one never made.
        self._folder(job_id).mkdir(parents=True, exist_ok=True)
        return records.handle()

    async def start(self, attempt: Attempt) -> None:
        live = _Live(attempt)
        self._live[attempt.spec.job_id] = live
        try:
            await asyncio.to_thread(records.prepare, self._of(live), attempt)
            if live.stop:
                self._settle(live, self._never(live))
                return
            self._servers.order(attempt.version, self._order(attempt))
        except OSError as error:
            self._settle(live, self._lost(live, f"the job cannot be started: {error}"))

    def stop(self, job_id: str) -> None:
        live = self._live.get(job_id)
        if live is not None:
            live.stop = True
            if self._servers.withdraw(live.attempt.version, job_id):
                self._settle(live, self._never(live))
            else:
                self._signal(live)

    async def recover(self, attempt: Attempt) -> None:
        job_id = attempt.spec.job_id
        live = _Live(attempt)
        self._live[job_id] = live
        gpus = records.started_gpus(self._of(live), attempt.number)
        self._ledger.hold(job_id, attempt.version.api.compute, gpus)
        if not await self._take_up(live):
            self._run(self._until_told(live))

    def warm(self, version: Version) -> None:
        self._servers.warm(version)

    def forget(self, api_id: str) -> None:
        self._servers.forget(api_id)

    def log(self, job_id: str) -> Path:
        return self._folder(job_id) / "log"

    def note(self, job_id: str, text: str) -> None:
        records.append(self.log(job_id), text)

    def forked(self, reply: Reply, pidfd: int) -> None:
        """From a fork server: the supervisor of an order is there."""
        live = self._live.get(reply.job_id or "")
        if live is None or live.attempt.number != reply.attempt:
            if pidfd >= 0:
                os.close(pidfd)
        elif pidfd < 0:  # this process has too many open files to take it
            self._run(self._until_told(live))
        else:
            self._watch(live, pidfd)

    def recorded(self, reply: Reply) -> None:
        """From a supervisor: the job has started."""
        live = self._live.get(reply.job_id or "")
        if live is not None and live.attempt.number == reply.attempt:
            self._started(live, reply.start_ns)

    def not_forked(self, job_id: str, reason: str) -> None:
        """From a fork server: an order that failed for good."""
        live = self._live.get(job_id)
        if live is not None:
            self._settle(live, self._lost(live, reason))

    def unanswered(self, job_id: str) -> None:
        """From a fork server that died: the start record tells whether it had forked."""
        live = self._live.get(job_id)
        if live is not None:
            self._run(self._until_told(live))

    def _prepare(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            link = self._import_dir / "cortex"
            self._import_dir.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(Path(cortex.__file__).parent)
        except OSError as error:
            raise StartupError(
                f"the data folder {self._root} cannot be written: {error}; choose another one"
            ) from error
        self._ledger = Ledger(self._total or detect())
        if self._memory_limit == "watchdog":
            self._limits = limits.watchdog(self._root)
        else:
            self._limits = limits.probe(self._root)
        for group in self._limits.stale():
            job_id, _, number = group.name.removeprefix(self._limits.prefix).rpartition("-")
            alive = number.isdigit() and records.supervised(self._folder(job_id), int(number))
            if not alive:
                with contextlib.suppress(OSError):
                    group.rmdir()

    def _order(self, attempt: Attempt) -> Order:
        spec, compute = attempt.spec, attempt.version.api.compute
        gpus = self._ledger.gpus(spec.job_id)
        return Order(
            job_id=spec.job_id,
            attempt=attempt.number,
            folder=str(self._folder(spec.job_id)),
            grace_s=self._grace_s,
            timeout=spec.timeout,
            deadline_ns=spec.deadline_ns,
            mem=compute.mem,
            memory_kind=None if compute.mem is None else self._limits.kind,
            memory_dir=self._limits.memory_dir(spec.job_id, attempt.number),
            kill_dir=self._limits.kill_dir(spec.job_id, attempt.number),
            gpus=gpus,
            visible_gpus=",".join(map(str, gpus)) if self._ledger.total.gpu else None,
        )

    def _started(self, live: _Live, start_ns: int) -> None:
        if not live.started:
            live.started = True
            self._report(Started(live.attempt.spec.job_id, live.attempt.number, start_ns))

    def _watch(self, live: _Live, pidfd: int) -> None:
        live.pidfd = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._on_gone, live)
        if live.stop:
            self._signal(live)

    def _on_gone(self, live: _Live) -> None:
        if live.pidfd is None:
            return
        # An operator that is PID 1 of a container inherits supervisors from fork servers.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, live.pidfd, os.WEXITED | os.WNOHANG)
        self._let_go(live)
        self._run(self._conclude(live))

    async def _conclude(self, live: _Live) -> None:
        """The supervisor is gone: say what became of the attempt, as soon as that can be told."""
        told = False
        while True:
            try:
                gone = records.ended(self._of(live), live.attempt.number)
            except OSError as error:
                if live.stop and told:
                    gone = records.Gone(None, None, rebooted=False)
                else:
                    told = self._unreachable(live, error, told=told)
                    await asyncio.sleep(RETRY_S)
                    continue
            await self._end(live, gone)
            return

    async def _until_told(self, live: _Live) -> None:
        while not await self._take_up(live):  # noqa: ASYNC110  # nothing wakes us when a folder is back
            await asyncio.sleep(RETRY_S)

    async def _take_up(self, live: _Live) -> bool:
        """Find out what became of an attempt, and go on from there; False if it cannot be told."""
        try:
            found = await asyncio.to_thread(records.look, self._of(live), live.attempt)
        except OSError as error:
            self._unreachable(live, error, told=False)
            return False
        if isinstance(found, records.Fenced):
            self._settle(live, self._never(live))
        elif isinstance(found, records.Alive):
            self._started(live, found.start.start_ns)
            self._watch(live, found.pidfd)
        else:
            await self._end(live, found)
        return True

    async def _end(self, live: _Live, gone: records.Gone) -> None:
        spec = live.attempt.spec
        record = gone.exit
        if record is not None and record.ending != "lost":
            self._started(live, record.start_ns)  # a short job may end before its start was seen
            self._settle(live, self._ended(live, record))
            return
        if gone.start is not None and gone.start.fenced:
            self._settle(live, self._never(live))
            return
        groups = gone.start.cgroups if gone.start else []
        await asyncio.to_thread(records.clean, spec.job_id, groups)
        if record is not None:
            reason = record.message or _KILLED
        else:
            reason = _REBOOTED if gone.rebooted else _KILLED
        self._settle(live, self._lost(live, reason))

    def _ended(self, live: _Live, record: ExitRecord) -> Ended:
        return Ended(
            job_id=live.attempt.spec.job_id,
            attempt=live.attempt.number,
            ending=Ending(record.ending),
            start_ns=record.start_ns,
            end_ns=record.end_ns,
            exit_code=record.exit_code,
            message=record.message,
            result=record.result,  # type: ignore[arg-type]  # it was read from JSON
            has_result=record.has_result,
        )

    def _lost(self, live: _Live, reason: str) -> Lost:
        return Lost(live.attempt.spec.job_id, live.attempt.number, reason)

    def _never(self, live: _Live) -> NeverStarted:
        return NeverStarted(live.attempt.spec.job_id, live.attempt.number)

    def _unreachable(self, live: _Live, error: OSError, *, told: bool) -> bool:
        if not told:
            reason = f"the job's folder cannot be read: {error}"
            self._report(Unreachable(live.attempt.spec.job_id, live.attempt.number, reason))
        return True

    def _settle(self, live: _Live, last: Ended | Lost | NeverStarted) -> None:
        if self._live.get(last.job_id) is not live:
            return
        del self._live[last.job_id]
        self._let_go(live)
        freed = self._ledger.release(last.job_id)
        self._report(last)
        if freed:
            self._report(CapacityFreed())

    def _signal(self, live: _Live) -> None:
        if live.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(live.pidfd, signal.SIGTERM)

    def _let_go(self, live: _Live) -> None:
        if live.pidfd is not None:
            asyncio.get_running_loop().remove_reader(live.pidfd)
            os.close(live.pidfd)
            live.pidfd = None

    def _run(self, work: Coroutine[None, None, None]) -> None:
        if self._closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _of(self, live: _Live) -> Path:
        return self._folder(live.attempt.spec.job_id)

    def _folder(self, job_id: str) -> Path:
        return self._root / job_id
