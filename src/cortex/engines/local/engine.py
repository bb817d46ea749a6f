"""The engine protocol on one machine. Called by the dispatcher, by the agents of nodes, and by
`tests/engines`.

The engine turns attempts into orders. Fork servers carry the orders out (`fork_server_pool`),
`attempts` follows each attempt to its end, and `machine` counts the capacity.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cortex.engines.base import (
    NOTHING,
    Attempt,
    Capabilities,
    Capacity,
    CapacityFreed,
    Report,
    Version,
)
from cortex.engines.local import cgroup_support, cgroups, records, workspaces
from cortex.engines.local.attempts import Attempts
from cortex.engines.local.cgroups import CgroupManager
from cortex.engines.local.fork_server_pool import ForkServerPool
from cortex.engines.local.machine import MachineLedger, detect
from cortex.engines.local.orphans import Orphans
from cortex.engines.local.supervisor import SupervisorHandle
from cortex.errors import StartupError
from cortex.joblog.folders import JobFolders
from cortex.spec.api import Compute
from cortex.spec.job import MAX_INLINE_BYTES
from cortex.system.account import Account
from cortex.system.background import in_thread
from cortex.worker.messages import Order


class LocalEngine:
    """Runs jobs as process trees of this machine. Each job has a folder below `root`."""

    def __init__(
        self,
        root: Path,
        total: Capacity | None = None,
        grace_s: float = 10.0,
        memory_limit: str | None = None,
        account: Account | None = None,
        own_folder: str | None = None,
        *,
        inherits: bool = False,
    ) -> None:
        """
        Args:
            total: the capacity for jobs; None for all that the machine has.
            grace_s: between SIGTERM and SIGKILL, for attempts without a grace of their own.
            memory_limit: "watchdog" to use no control groups, even if the machine has them.
            own_folder: "copy" to use no overlay, even if the machine allows one.
            inherits: whether this process becomes the parent of processes that killed fork servers
                leave, and ends them (PR_SET_CHILD_SUBREAPER).
        """
        self._folders = JobFolders(root)
        self._root = self._folders.root
        self._total = total
        self._grace_s = grace_s
        self._memory_limit = memory_limit
        self.ledger = MachineLedger(total or NOTHING, self._undo_prepare, self._report_freed)
        self._cgroup_support = cgroup_support.WATCHDOG
        self._cgroups = CgroupManager()
        self._inherits = inherits
        self._orphans = Orphans(self._processes)
        self._attempts = Attempts(self._folders, self._release, self._end_leftovers, account)
        self._prepared: dict[str, SupervisorHandle] = {}
        self._import_dir = self._root / ".import"
        self._account = account
        self._workspaces = workspaces.workspaces_of(self._root)
        self._own_folder = own_folder
        self._servers = ForkServerPool(
            self._attempts,
            self._import_dir,
            self._workspaces,
            self._orphans,
            account,
            self._cgroups,
        )
        self._sweep: asyncio.Future[None] | None = None
        self._handle = records.make_handle()

    @property
    def capabilities(self) -> Capabilities:
        own_folder = self._servers.own_folder
        return Capabilities("local", self.ledger.total, self._cgroup_support.method, own_folder)

    async def open(self, report: Report) -> None:
        self._attempts.report = report
        if not sys.platform.startswith("linux"):
            raise StartupError(f"the local engine needs Linux, this is {sys.platform}")
        try:
            os.close(os.pidfd_open(os.getpid()))
        except OSError as error:
            raise StartupError(
                f"the local engine needs pidfd_open, Linux 5.3 or later: {error}"
            ) from error
        self._cgroups.recover_groups(await asyncio.to_thread(self._prepare_machine))
        if self._inherits:
            self._orphans.open()
        # In the background: there may be very many files.
        self._sweep = asyncio.ensure_future(asyncio.to_thread(workspaces.sweep, self._workspaces))

    async def close(self) -> None:
        self._orphans.close()
        await self._attempts.close()
        for job_id in self._prepared:  # their supervisors never start them
            self._cgroups.release_limit(job_id)
        await self._servers.close()
        if self._sweep is not None:
            await self._sweep
        await self._cgroups.close()
        await in_thread(cgroup_support.remove_parents, self._root)

    def claim(self, job_id: str, attempt: int) -> str:
        # From here on a missing folder was moved or lost. Without it the attempt may have begun.
        records.create_job_folder(self._folders.folder_name(job_id), self._account)
        gpus = self.ledger.gpus(job_id)
        return records.make_handle(self._root, gpus) if gpus else self._handle

    def prepare(self, attempt: Attempt) -> None:
        try:
            order = self._order(attempt)
        except OSError:
            return  # `start` reports it
        order.held = True
        supervisor = self._servers.send_order_on_hold(attempt.version, order)
        if supervisor is not None:
            self._prepared[order.job_id] = supervisor

    def start(self, attempt: Attempt) -> None:
        prepared = self._prepared.pop(attempt.spec.job_id, None)
        tracked = _without_config(attempt)
        if prepared is not None and prepared.send_go():
            self._attempts.track(tracked, self._grace_of(attempt), prepared)
        else:
            self._attempts.track(tracked, self._grace_of(attempt))
            try:
                order = self._order(attempt)
            except OSError as error:
                reason = f"its control group cannot be made: {error}"
                self._attempts.on_order_failed(attempt.spec.job_id, reason)
                return
            self._servers.submit_order(attempt.version, order)
            self._attempts.withdraw_at_deadline(tracked, self._withdraw_order)

    def stop(self, job_id: str) -> None:
        self._attempts.stop(job_id, self._withdraw_order)

    def demand(self, waiting: Sequence[Compute]) -> None:
        """Does nothing: the machine does not grow."""

    async def recover(self, attempt: Attempt) -> None:
        job_id = attempt.spec.job_id
        gpus = records.granted_gpus(self._folders.folder(job_id), attempt)
        self.ledger.reserve_granted(job_id, attempt.version.api.compute, gpus)
        self._cgroups.adopt_limit(job_id, attempt.number)
        await self._attempts.recover(attempt, self._grace_of(attempt))

    def warm(self, version: Version) -> None:
        self._servers.warm(version)

    def forget(self, *, versions: Sequence[str] = (), jobs: Sequence[str] = ()) -> None:
        """See `Engine.forget`. This engine has no data of a job outside the job's folder."""
        for api_id in versions:
            self._servers.forget(api_id)

    def _grace_of(self, attempt: Attempt) -> float:
        return self._grace_s if attempt.grace_s is None else attempt.grace_s

    def _withdraw_order(self, attempt: Attempt) -> bool:
        return self._servers.withdraw_order(attempt.version, attempt.spec.job_id)

    def _processes(self) -> set[int]:
        return self._servers.processes() | self._attempts.supervisors()

    async def _end_leftovers(self) -> None:
        # Processes that a killed supervisor left must not run beside the job's next attempt.
        await self._servers.end_leftovers()
        await in_thread(workspaces.sweep, self._workspaces)

    def _release(self, job_id: str) -> bool:
        """Release a job's capacity and control group; whether another job may wait for them."""
        self._cgroups.release_limit(job_id)
        return self.ledger.remove_reservation(job_id) and self.ledger.pop_refused()

    def _undo_prepare(self, job_id: str) -> None:
        prepared = self._prepared.pop(job_id, None)
        if prepared is not None:
            prepared.withdraw_order_on_hold()
        self._cgroups.release_limit(job_id)

    def _report_freed(self) -> None:
        self._attempts.report(CapacityFreed())

    def _prepare_machine(self) -> list[Path]:
        """Prepare folders, control groups and the ledger. Blocking.

        Returns:
            The control groups of this data root whose attempts may still run.
        """
        workspaces.prepare_jobs(self._root, self._import_dir, self._account)
        self._handle = records.make_handle(self._root)
        self.ledger.set_total(self._total or detect())
        if self._memory_limit != "watchdog":
            self._cgroup_support = cgroup_support.probe(self._root, self._account)
        self._cgroups.prefix = cgroup_support.group_prefix(self._root)
        self._cgroups.account = self._account
        self._cgroups.memory = self._cgroup_support.memory
        self._cgroups.trees = self._cgroup_support.trees
        workspaces.prepare_workspaces(self._workspaces, self._account)
        self._servers.own_folder = self._own_folder or workspaces.probe(
            self._workspaces, self._account
        )
        return [
            group
            for group in cgroup_support.list_groups(self._root)
            if not self._remove_if_ended(group)
        ]

    def _remove_if_ended(self, group: Path) -> bool:
        """Remove the control group of an attempt that has ended; whether that succeeded."""
        job_id, _, number = group.name.removeprefix(self._cgroups.prefix).rpartition("-")
        if not number.isdigit() or records.is_supervised(self._folders.folder(job_id), int(number)):
            return False
        if cgroups.remove(group, timeout_s=0):
            return True
        try:
            exited = records.read_exit(self._folders.folder(job_id), int(number))
        except OSError:
            return False
        return exited.exit is not None and cgroups.kill_and_remove(group)

    def _order(self, attempt: Attempt) -> Order:
        spec, compute = attempt.spec, attempt.version.api.compute
        assert spec.config is not None  # the dispatcher reads it from the store at the claim
        gpus = self.ledger.gpus(spec.job_id)
        group = None
        if compute.mem is not None:
            group = self._cgroups.limit_memory(spec.job_id, attempt.number, compute.mem)
        return Order(
            job_id=spec.job_id,
            attempt=attempt.number,
            folder=self._folders.folder_name(spec.job_id),
            grace_s=self._grace_of(attempt),
            timeout=spec.timeout,
            deadline=attempt.deadline,
            log_limit=attempt.version.api.limits.log,
            mem=compute.mem,
            memory_kind=None if compute.mem is None else self._cgroup_support.kind,
            memory_dir=group,
            gpus=gpus,
            visible_gpus=",".join(map(str, gpus)) if self.ledger.total.gpu else None,
            job={**spec.facts(), "config": attempt.version.api.definition.config},
            submitted=spec.config,
            losses=attempt.losses,
            lost=attempt.lost,
        )


def _without_config(attempt: Attempt) -> Attempt:
    """The attempt as `attempts` tracks it, without a long config."""
    if len(attempt.spec.config or "") <= MAX_INLINE_BYTES:
        return attempt
    return replace(attempt, spec=replace(attempt.spec, config=None))
