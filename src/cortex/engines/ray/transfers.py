"""Sends projects and checkpoints to nodes, in pieces; a project once for all jobs that wait for it.

The pieces are arguments of calls to the node's agent, so that only the operator's machine has to
reach the node. Ray's object store would need the way back as well. `attempts` calls this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import structlog

from cortex.engines.ray.cluster import RETRY_DELAY_S, Cluster
from cortex.engines.ray.link import LinkError, Refused
from cortex.engines.ray.messages import PIECE_BYTES, Checkpoint
from cortex.engines.ray.tracked import TrackedAttempt
from cortex.spec.times import new_id
from cortex.system.background import in_thread

log = structlog.get_logger()

STALL_TIMEOUT_S = 30.0
PACK_TIMEOUT_S = 300.0
INSTALL_POLL_S = 5.0
REPORT_INTERVAL_S = 0.5
PIECES_IN_FLIGHT = 8
MAX_TRANSFERS = 32  # at a time: with PIECES_IN_FLIGHT, they bound the memory that transfers take
MAX_RESTARTS = 3
_MB = 1_000_000


@dataclass(frozen=True)
class _Archive:
    """A packed project or a checkpoint, in a file without a name."""

    file: IO[bytes]
    size: int
    digest: str


@dataclass(eq=False)
class _Packing:
    """The archive that the transfers of one project share."""

    task: asyncio.Task[_Archive]
    users: int = 0


@dataclass(eq=False)
class _Transfer:
    """One archive on its way to one node."""

    node_id: str
    node_name: str
    what: str = "project"
    sent: int = 0
    size: int = 0
    waiters: int = 0
    last_progress: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None

    @property
    def phase(self) -> str:
        """What a job waits for meanwhile, in words."""
        phase = f"its {self.what} is being sent to {self.node_name}"
        if self.size < _MB:
            return phase
        return f"{phase} ({self.sent // _MB} of {self.size // _MB} MB)"


class _Stalled(Exception):
    """A node has accepted nothing for `STALL_TIMEOUT_S`; the message is the last failure's."""


class Transfers:
    """All methods are called on the event loop."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        """
        Args:
            cluster: reaches the agents.
            folder: where archives lie while they are sent.
        """
        self._cluster = cluster
        self._folder = folder
        self._transfers: dict[tuple[str, str], _Transfer] = {}
        self._packings: dict[str, _Packing] = {}
        self._slots = asyncio.Semaphore(MAX_TRANSFERS)

    async def send(
        self,
        tracked: TrackedAttempt,
        report_phase: Callable[[str], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Send the project of an attempt to its node. Return early where `is_cancelled`.

        Args:
            report_phase: called with what the attempt waits for, whenever that changes.

        Raises:
            LinkError: the node does not accept the project; the message says why.
            Refused: the project cannot be packed, or the node cannot store it.
            OSError: this machine cannot store the archive now.
        """
        transfer = self._join(tracked)
        task = transfer.task
        assert task is not None
        transfer.waiters += 1
        try:
            await self._wait(transfer, task, report_phase, is_cancelled)
        finally:
            transfer.waiters -= 1
            if transfer.waiters == 0:
                self._remove(tracked, transfer)
                task.cancel()

    async def send_checkpoint(
        self,
        tracked: TrackedAttempt,
        checkpoint: Checkpoint,
        file: IO[bytes],
        report_phase: Callable[[str], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        """Send the checkpoint of an earlier attempt to the node of the next one, as `send` does
        with a project.

        Args:
            file: the archive.
        """
        archive = _Archive(file, checkpoint.size, checkpoint.digest)
        limit = tracked.attempt.version.api.limits.checkpoint
        transfer = _Transfer(tracked.node_id, self._name_of(tracked), "checkpoint")

        async def send() -> None:
            async with self._slots:
                await self._deliver(transfer, archive, "install_checkpoint", checkpoint, limit)

        task = asyncio.create_task(send(), name=f"checkpoint to {transfer.node_name}")
        try:
            await self._wait(transfer, task, report_phase, is_cancelled)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # it reads the caller's file

    async def _wait(
        self,
        transfer: _Transfer,
        task: asyncio.Task[None],
        report_phase: Callable[[str], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        phase = ""
        while not task.done() and not is_cancelled():
            if transfer.phase != phase:
                phase = transfer.phase
                report_phase(phase)
            await asyncio.wait({task}, timeout=REPORT_INTERVAL_S)
        if task.done():
            task.result()

    def _name_of(self, tracked: TrackedAttempt) -> str:
        node = self._cluster.nodes.alive.get(tracked.node_id)
        return tracked.node_id if node is None else node.name

    def _join(self, tracked: TrackedAttempt) -> _Transfer:
        """The transfer of the attempt's project to its node, which other attempts may share."""
        version = tracked.attempt.version
        key = tracked.node_id, version.api.project_id
        transfer = self._transfers.get(key)
        if transfer is None:
            name = self._name_of(tracked)
            transfer = self._transfers[key] = _Transfer(tracked.node_id, name)
            work = self._transfer(transfer, version.api.project_id, version.project)
            transfer.task = asyncio.create_task(work, name=f"project to {name}")
            transfer.task.add_done_callback(lambda _: self._remove(tracked, transfer))
        return transfer

    def _remove(self, tracked: TrackedAttempt, transfer: _Transfer) -> None:
        key = tracked.node_id, tracked.attempt.version.api.project_id
        if self._transfers.get(key) is transfer:
            del self._transfers[key]

    async def _transfer(self, transfer: _Transfer, project_id: str, project: Path) -> None:
        async with self._slots, self._packed(project_id, project) as archive:
            arguments = project_id, archive.size, archive.digest
            await self._deliver(transfer, archive, "install_project", *arguments)

    async def _deliver(
        self, transfer: _Transfer, archive: _Archive, install: str, *arguments: object
    ) -> None:
        """Send an archive, and begin again where the agent is replaced meanwhile.

        Args:
            install: the agent's method that unpacks it.
            arguments: of that method, between the transfer's name and the time to wait.
        """
        transfer.size, transfer.last_progress = archive.size, time.monotonic()
        what = transfer.what
        try:
            for _ in range(MAX_RESTARTS + 1):
                if await self._send(transfer, archive, install, arguments):
                    return
                log.warning(f"{what} sent again: agent replaced", node=transfer.node_name)
        except _Stalled as stalled:
            reason = f"{transfer.node_name} does not answer {await self._own_name()}"
            log.warning(f"{what} not sent", node=transfer.node_name, error=str(stalled))
            self._cluster.suspect(transfer.node_id, reason)
            raise LinkError(f"its {what} cannot be sent: {reason}") from stalled
        raise LinkError(
            f"its {what} cannot be sent: the agent of {transfer.node_name} was replaced "
            f"{MAX_RESTARTS + 1} times meanwhile"
        )

    async def _send(
        self,
        transfer: _Transfer,
        archive: _Archive,
        install: str,
        arguments: tuple[object, ...],
    ) -> bool:
        """Send an archive from its beginning.

        Returns:
            Whether it has arrived; False where the agent was replaced meanwhile.
        """
        name, transfer.sent = new_id(), 0
        await self._call(transfer, "begin_project", name)
        offsets = iter(range(0, archive.size, PIECE_BYTES))

        async def send_pieces() -> bool:
            for offset in offsets:
                data = await in_thread(os.pread, archive.file.fileno(), PIECE_BYTES, offset)
                if not await self._call(transfer, "receive_project", name, offset, data):
                    return False
                transfer.sent += len(data)
            return True

        senders = [asyncio.create_task(send_pieces()) for _ in range(PIECES_IN_FLIGHT)]
        try:
            if not all(await asyncio.gather(*senders)):
                return False
        finally:
            for sender in senders:
                sender.cancel()
            await asyncio.gather(*senders, return_exceptions=True)
        arguments = name, *arguments, INSTALL_POLL_S
        while (is_installed := await self._call(transfer, install, *arguments)) is None:
            pass  # the agent is at work: each answer is progress
        return bool(is_installed)

    async def _call(self, transfer: _Transfer, method: str, *arguments: object) -> object:
        """Call the agent, and repeat the call while the transfer makes progress.

        Raises:
            LinkError: the whole cluster is out of reach.
            _Stalled: the node has accepted nothing for `STALL_TIMEOUT_S`.
            Refused: the node cannot store the archive.
        """
        while True:
            stalls_at = transfer.last_progress + STALL_TIMEOUT_S
            timeout_s = max(RETRY_DELAY_S, stalls_at - time.monotonic())
            try:
                answer = await self._cluster.call_agent(
                    transfer.node_id, method, *arguments, timeout_s=timeout_s
                )
            except LinkError as error:
                if not self._cluster.is_joined:
                    raise
                if time.monotonic() >= transfer.last_progress + STALL_TIMEOUT_S:
                    raise _Stalled(str(error)) from error
                await asyncio.sleep(RETRY_DELAY_S)
            else:
                transfer.last_progress = time.monotonic()
                return answer

    async def _own_name(self) -> str:
        with contextlib.suppress(LinkError, Refused):
            return f"the driver at {await self._cluster.call_driver('own_address')}"
        return "the driver"

    @contextlib.asynccontextmanager
    async def _packed(self, project_id: str, project: Path) -> AsyncIterator[_Archive]:
        """The archive of a project; the last user removes it."""
        packing = self._packings.get(project_id)
        if packing is None:
            packing = _Packing(asyncio.create_task(self._pack(project), name="pack a project"))
            self._packings[project_id] = packing
        packing.users += 1
        try:
            yield await asyncio.shield(packing.task)
        finally:
            packing.users -= 1
            if packing.users == 0:
                del self._packings[project_id]
                packing.task.cancel()
                packing.task.add_done_callback(_close_archive)

    async def _pack(self, project: Path) -> _Archive:
        file = await in_thread(temporary_file, self._folder)
        try:
            packed = await self._cluster.call_driver(
                "pack_project",
                str(project),
                f"/proc/{os.getpid()}/fd/{file.fileno()}",
                timeout_s=PACK_TIMEOUT_S,
            )
        except BaseException:
            file.close()
            raise
        assert isinstance(packed, tuple)
        size, digest = packed
        return _Archive(file, size, digest)


def temporary_file(folder: Path) -> IO[bytes]:
    """A file without a name: nothing is left of it, however this process ends. Blocking."""
    return tempfile.TemporaryFile(dir=folder)


def _close_archive(task: asyncio.Task[_Archive]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().file.close()
