"""The agent of a node: a detached actor, which Ray restarts when it dies. It runs the local engine
in a folder of the node, and keeps the engine's observations until the operator has received them.

The Ray engine calls `hello` through the driver, and the other public methods over a connection of
its own (`server`). Jobs do not depend on the agent: their supervisors go on without it, and a new
agent recovers them, as an operator does on one machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path

import ray.util

from cortex.engines.base import (
    Attempt,
    Capacity,
    CapacityFreed,
    Ended,
    Lost,
    NeverStarted,
    Observation,
    Started,
    Version,
    Waits,
)
from cortex.engines.capacity import capacity_of
from cortex.engines.local import LocalEngine, leftovers, records
from cortex.engines.ray.log_copies import read_piece
from cortex.engines.ray.messages import (
    AGENT_VERSION,
    Checkpoint,
    Hello,
    Lock,
    LogPiece,
    NodeOrder,
    Poll,
    Refusal,
)
from cortex.engines.ray.ray_errors import explain
from cortex.joblog.folders import JobFolders
from cortex.joblog.watch import FileWatch
from cortex.projects.builder import EnvironmentFailed
from cortex.ray_node.checkpoints import Checkpoints
from cortex.ray_node.incoming import IncomingArchives
from cortex.ray_node.node_reservations import GpusUnavailable, NodeReservations
from cortex.ray_node.outbox import Entry, Outbox
from cortex.ray_node.provisions import Provisions
from cortex.ray_node.raylet import RayletHealth
from cortex.ray_node.server import AgentServer
from cortex.ray_node.workspace import AgentFolder
from cortex.system.background import in_thread
from cortex.system.oserrors import is_shortage, is_storage
from cortex.worker import processes

_PIECE_BYTES = 256 << 10
_REST_BYTES = 64 << 10  # the most of a log that comes with the end of its job
_POLL_BYTES = 8 << 20  # the logs of one answer to a poll, and the observations, take about as much
_NO_RECORDS = "the folder of its node, with the job's records in it, is gone"
_POLL_INTERVAL_S = 1.0  # a poll of a killed operator may clear the event that wakes the next poll
_FEW = 4  # rests of logs, which take less time than the switch to a thread
_BATCH_S = 0.05  # collects the lines of a growing log into one piece


class Agent:
    """The agent of one node."""

    def __init__(
        self,
        namespace: str,
        node_id: str,
        node_dir: str,
        total: Capacity,
        raylet: tuple[str, int],
    ) -> None:
        self._agent_folder = AgentFolder.acquire(namespace, node_id, node_dir)
        self._opening = asyncio.Lock()
        self._folders = JobFolders(self._agent_folder.jobs)
        self._engine = LocalEngine(self._agent_folder.jobs, total)
        self._is_open = False
        self._provisions = Provisions(self._agent_folder, self._add_to_outbox)
        self._incoming = IncomingArchives(self._provisions)
        self._checkpoints = Checkpoints(
            self._agent_folder.checkpoints, self._folders, self._add_to_outbox
        )
        self._outbox = Outbox()
        self._entry_added = asyncio.Event()  # to the outbox
        self._poll_wakeup = asyncio.Event()  # a new entry of the outbox, or a log that has grown
        self._orders: dict[str, NodeOrder] = {}
        self._starts: dict[str, Started] = {}
        self._building: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._logs = FileWatch("log watch")
        self._raylet = RayletHealth(raylet, self._wake_poll)
        self._reservations = NodeReservations(
            namespace, node_id, lambda: self._raylet.problem is None, self._wake_poll
        )
        # What `poll` last returned about the node, by session.
        self._reported: dict[str, tuple[Capacity, str | None]] = {}
        # Ray types a part of itself.
        self._host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._server = AgentServer(self)

    async def hello(self) -> Hello:
        await self._open()
        reported = self._reported.items()
        self._reported = {each: node for each, node in reported if self._outbox.has(each)}
        return Hello(
            version=AGENT_VERSION,
            incarnation=self._outbox.subscribe(),
            root=self._agent_folder.identity,
            local_handle=records.make_handle(),
            memory_limit=self._engine.capabilities.memory_limit,
            own_folder=self._engine.capabilities.own_folder,
            seq=self._outbox.end,
            host=self._host,
            port=self._server.port,
            key=self._server.key,
        )

    async def start(self, order: NodeOrder) -> str | None:
        """Start an attempt.

        Returns:
            "project" where the project's files are missing, "checkpoint" where the checkpoint of
            an earlier attempt is; nothing is started then.
        """
        await self._open()
        job_id = order.spec.job_id
        self._check(order)
        if not self._provisions.folder(order.api.project_id).is_dir():
            return "project"
        if await self._checkpoints.lacks(order):
            return "checkpoint"
        known = self._orders.get(job_id)
        if known is not None and known.number != order.number:
            raise RuntimeError("an earlier attempt of the job, whose order came late, still runs")
        if known is None:
            self._orders[job_id] = order
            self._building[job_id] = self._run(self._start(order, _deadline(order)))
        return None

    async def begin_project(self, name: str) -> None:
        """Begin to receive a project; see `IncomingArchives.begin`."""
        await self._open()
        await self._incoming.begin(name)

    async def receive_project(self, name: str, offset: int, data: bytes) -> bool:
        """See `IncomingArchives.receive`."""
        await self._open()
        return await self._incoming.receive(name, offset, data)

    async def install_project(
        self, name: str, project_id: str, size: int, digest: str, within_s: float
    ) -> bool | None:
        """Unpack a project that has arrived; see `IncomingArchives.install`. True also where the
        node has the project already."""
        await self._open()
        store = partial(self._provisions.store_project, project_id)
        is_stored = await self._incoming.install(name, size, digest, within_s, store)
        if is_stored is False:
            return self._provisions.folder(project_id).is_dir()
        return is_stored

    async def install_checkpoint(
        self, name: str, checkpoint: Checkpoint, limit: int, within_s: float
    ) -> bool | None:
        """Unpack a checkpoint that has arrived, for the next attempt of its job. It arrives as
        projects do; see `IncomingArchives.install`."""
        await self._open()
        store = partial(self._checkpoints.store, checkpoint, limit)
        return await self._incoming.install(
            name, checkpoint.size, checkpoint.digest, within_s, store
        )

    async def read_checkpoint(self, job_id: str, digest: str, offset: int) -> bytes | None:
        """See `Checkpoints.read`."""
        return await self._checkpoints.read(job_id, digest, offset)

    async def drop_checkpoint(self, job_id: str, digest: str) -> None:
        """See `Checkpoints.fetched`."""
        self._checkpoints.fetched(job_id, digest)

    async def stop(self, job_id: str, grace_s: float | None = None) -> None:
        """Stop an attempt.

        Args:
            grace_s: the seconds between SIGTERM and SIGKILL; None for those of its order.
        """
        await self._open()
        building = self._building.pop(job_id, None)
        if building is None:
            self._engine.stop(job_id)
            order = self._orders.get(job_id)
            if grace_s is not None and order is not None:
                self._run(self._kill_later(order, grace_s))
            return
        building.cancel()
        await asyncio.gather(building, return_exceptions=True)
        if job_id in self._orders:
            self._on_observation(NeverStarted(job_id, self._orders[job_id].number))

    async def recover(self, order: NodeOrder) -> None:
        """Report the state of an attempt. An earlier agent may have started it, or none."""
        await self._open()
        job_id = order.spec.job_id
        self._check(order)
        known = self._orders.get(job_id)
        if known is not None and known.number == order.number:
            if job_id in self._starts:
                self._add_to_outbox(self._starts[job_id])
            self._checkpoints.offer_again(job_id)
            return
        superseded_build = self._building.pop(job_id, None)
        if superseded_build is not None:  # log, stop and end now belong to this attempt
            superseded_build.cancel()
        folder = self._folders.folder(job_id)
        self._orders[job_id] = order
        try:
            if not folder.exists() and await in_thread(_ended, folder, order.number):
                self._on_observation(Lost(job_id, order.number, _NO_RECORDS))
                return
            folder.mkdir(0o700, parents=True, exist_ok=True)
        except OSError:  # the operator calls again, which must not find the attempt recovered
            self._orders.pop(job_id, None)
            raise
        self._reservations.add(job_id, capacity_of(order.api.compute))
        self._checkpoints.watch(order)
        await self._engine.recover(self._attempt(order, Path(), _deadline(order)))

    async def poll(
        self, incarnation: str, after: int, cursors: dict[str, int], within_s: float
    ) -> Poll:
        """Wait until there are observations after `after`, or logs that exceed these offsets.

        Returns:
            Both, as far as one answer can be that large. The incarnation is empty where the agent
            has dropped observations that the caller lacks.
        """
        if not self._outbox.renew(incarnation):
            self._reported.pop(incarnation, None)
            return Poll("", after, ())
        self._outbox.acknowledge(incarnation, after)
        until = time.monotonic() + within_s
        while True:
            self._poll_wakeup.clear()
            logs = await asyncio.to_thread(self._grown, cursors) if cursors else {}
            left_s = until - time.monotonic()
            node = (self._reservations.held, self._raylet.problem)
            has_news = self._outbox.end > after or node != self._reported.get(incarnation)
            if logs or has_news or left_s <= 0:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poll_wakeup.wait(), min(left_s, _POLL_INTERVAL_S))
            if self._outbox.end == after:
                self._entry_added.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._entry_added.wait(), _BATCH_S)
        self._reported[incarnation] = node
        entries = self._outbox.since(after, _POLL_BYTES)
        copied = {**cursors, **{job_id: piece.end for job_id, piece in logs.items()}}
        rests = await self._rests(entries, copied)
        seen = tuple(entry.content for entry in entries)
        return Poll(incarnation, after + len(seen), seen, logs, rests, *node)

    async def read(self, job_id: str, offset: int, limit: int) -> LogPiece:
        log = self._folders.log(job_id)
        return await asyncio.to_thread(read_piece, log, offset, _PIECE_BYTES, limit)

    async def forget(self, api_id: str) -> None:
        """See `Engine.forget`, for a version."""
        self._provisions.forget(api_id)
        self._engine.forget(versions=[api_id])

    async def discard(self, job_ids: list[str]) -> None:
        """See `Engine.forget`. It removes the folders of the jobs that do not run here."""
        for job_id in job_ids:
            if job_id not in self._orders:
                await self._checkpoints.remove(job_id)
                await asyncio.to_thread(self._folders.remove, job_id)

    async def is_idle(self) -> bool:
        """Whether the agent has no attempt, and Ray no reservation of it: then it may be ended."""
        return not self._orders and self._reservations.is_idle

    async def _open(self) -> None:
        # Each method calls it: Ray may have restarted this process since the operator's hello.
        async with self._opening:
            await self._server.open(self._host)
            if not self._is_open:
                await asyncio.to_thread(self._provisions.open)
                await asyncio.to_thread(self._checkpoints.open)
                await self._engine.open(self._on_observation)
                self._reservations.open()
                self._raylet.open()
                self._is_open = True

    async def _kill_later(self, order: NodeOrder, delay_s: float) -> None:
        """Kill the processes of an attempt that has not ended by then. Its supervisor, which has
        received the grace period with the order, would kill them later."""
        await asyncio.sleep(delay_s)
        job_id = order.spec.job_id
        if self._orders.get(job_id) is order:
            await in_thread(_kill_processes, job_id)

    def _check(self, order: NodeOrder) -> None:
        if order.root != self._agent_folder.identity:
            raise Refusal(_NO_RECORDS)

    async def _start(self, order: NodeOrder, deadline: float | None) -> None:
        job_id = order.spec.job_id
        gpus: tuple[int, ...] = ()

        def report_phase(phase: str) -> None:
            self._on_observation(Waits(job_id, order.number, phase))

        try:
            async with asyncio.timeout(order.left_s):
                gpus = await self._reserve(order)
                python = await self._provisions.build(order, report_phase)
            self._begin_log(job_id)
            await self._checkpoints.put_in_place(order)
        except Exception as error:  # the task has no waiter: report every failure
            self._building.pop(job_id, None)
            self._on_observation(self._failed(order, error))
        else:
            self._building.pop(job_id, None)  # from here on the engine stops the attempt
            # The operator and Ray have decided what the job may take, the indices of GPUs included.
            self._engine.ledger.reserve_granted(job_id, order.api.compute, list(gpus))
            self._checkpoints.watch(order)
            self._engine.start(self._attempt(order, python, deadline))

    async def _reserve(self, order: NodeOrder) -> tuple[int, ...]:
        """Reserve what a job takes; its GPUs.

        Raises:
            GpusUnavailable: Ray has not reserved the GPUs in time.
        """
        job_id, amount = order.spec.job_id, capacity_of(order.api.compute)
        if not amount.gpu:
            self._reservations.add(job_id, amount)
            return ()
        self._add_to_outbox(Waits(job_id, order.number, "waits for Ray to reserve its GPUs"))
        return await self._reservations.add_with_gpus(job_id, amount)

    def _failed(self, order: NodeOrder, error: Exception) -> Lost | NeverStarted:
        """The report on an attempt that could not be started."""
        job_id, number = order.spec.job_id, order.number
        if isinstance(error, TimeoutError):
            return NeverStarted(job_id, number)  # the operator handles its deadline
        if isinstance(error, GpusUnavailable):
            return NeverStarted(job_id, number, str(error))
        if isinstance(error, EnvironmentFailed):
            if error.is_temporary:
                reason = "its node's disk is full, and the environment not built"
                return NeverStarted(job_id, number, reason)
            with contextlib.suppress(OSError):
                self._begin_log(job_id)
                self._folders.append_to_log(job_id, error.output)
            return Lost(job_id, number, error.reason, is_final=True)
        reason = f"it cannot be started on its node: {explain(error)}"
        if isinstance(error, OSError) and (is_storage(error) or is_shortage(error)):
            return NeverStarted(job_id, number, reason)
        return Lost(job_id, number, reason)

    def _begin_log(self, job_id: str) -> None:
        """Begin an empty log: the operator has the logs of earlier attempts."""
        try:
            self._folders.folder(job_id).mkdir(0o700, parents=True)
        except FileExistsError:
            for path in (self._folders.log(job_id), self._folders.cut(job_id)):
                path.unlink(missing_ok=True)

    def _watch_log(self, job_id: str) -> None:
        # No inotify instance or watch is left: `poll` reads the log every `_POLL_INTERVAL_S`.
        with contextlib.suppress(OSError):
            self._logs.watch_growth(self._folders.log(job_id), self._poll_wakeup.set)

    def _attempt(self, order: NodeOrder, python: Path, deadline: float | None) -> Attempt:
        version = Version(
            order.api, self._provisions.folder(order.api.project_id), python, order.env
        )
        return Attempt(
            order.spec,
            version,
            order.number,
            order.local_handle,
            deadline,
            order.losses,
            order.lost,
            order.grace_s,
        )

    def _grown(self, cursors: dict[str, int]) -> dict[str, LogPiece]:
        pieces, left = {}, _POLL_BYTES
        # In random order: where the logs exceed one answer, none waits for the same others again.
        for job_id in random.sample(list(cursors), len(cursors)):
            order, offset = self._orders.get(job_id), cursors[job_id]
            if order is None:  # ended: see `_rests`
                continue
            log = self._folders.log(job_id)
            if left <= 0 or not _exceeds(log, offset):
                continue
            piece = read_piece(log, offset, _PIECE_BYTES, order.api.limits.log)
            if piece.end > offset:
                pieces[job_id] = piece
                left -= len(piece.data)
        return pieces

    async def _rests(self, entries: Sequence[Entry], copied: dict[str, int]) -> dict[str, LogPiece]:
        """The rests of the logs of the jobs whose ends are among the entries, where one small piece
        is left.

        Args:
            copied: the offsets up to which the operator has the logs, by job. It may have any part
                of the log of a job that is missing there.
        """
        # The log of a job that has an order is that of the next attempt.
        limits = {
            entry.content.job_id: entry.log_limit
            for entry in entries
            if entry.log_limit is not None
            and isinstance(entry.content, Ended | Lost)
            and entry.content.job_id not in self._orders
        }
        if not limits:
            return {}
        if len(limits) > _FEW:
            rests = await asyncio.to_thread(self._read_rests, limits, copied)
        else:  # a thread would take longer
            rests = self._read_rests(limits, copied)
        return {job_id: rest for job_id, rest in rests.items() if job_id not in self._orders}

    def _read_rests(self, limits: dict[str, int], copied: dict[str, int]) -> dict[str, LogPiece]:
        rests, left = {}, _POLL_BYTES
        for job_id, limit in limits.items():
            if left <= 0:
                break
            log = self._folders.log(job_id)
            rest = read_piece(log, copied.get(job_id, 0), _REST_BYTES, limit)
            if not _exceeds(log, rest.end) or read_piece(log, rest.end, 1, limit).end == rest.end:
                rests[job_id] = rest
                left -= len(rest.data)
        return rests

    def _on_observation(self, observation: Observation) -> None:
        if isinstance(observation, CapacityFreed):
            return
        job_id = observation.job_id
        order = self._orders.get(job_id)
        if order is None or order.number != observation.attempt:
            return  # the attempt had ended before its order came, and the operator knows its end
        is_followed = isinstance(observation, Lost) and not observation.is_final
        if is_followed and self._checkpoints.is_watched(job_id):
            self._run(self._take_last_checkpoint(job_id, observation))
            return
        log_limit = None
        if isinstance(observation, Started):
            self._starts[job_id] = observation
            self._watch_log(job_id)  # before that, no operator reads it
        elif isinstance(observation, Ended | Lost | NeverStarted):
            del self._orders[job_id]
            if not is_followed:
                self._checkpoints.ended(job_id)
            self._starts.pop(job_id, None)
            self._logs.remove(self._folders.log(job_id), self._poll_wakeup.set)
            self._reservations.remove(job_id)
            log_limit = order.api.limits.log
        self._add_to_outbox(observation, log_limit)

    async def _take_last_checkpoint(self, job_id: str, lost: Observation) -> None:
        """Pack what a lost attempt has left, before its loss is reported: the next one may begin on
        another node."""
        try:
            await self._checkpoints.take_last(job_id)
        finally:
            self._on_observation(lost)

    def _wake_poll(self) -> None:
        self._entry_added.set()
        self._poll_wakeup.set()

    def _add_to_outbox(
        self, content: Observation | Lock | Checkpoint, log_limit: int | None = None
    ) -> None:
        self._outbox.add(Entry(content, log_limit))
        self._wake_poll()

    def _run(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _deadline(order: NodeOrder) -> float | None:
    """The deadline of an order by this machine's monotonic clock."""
    return None if order.left_s is None else time.monotonic() + order.left_s


def _exceeds(log: Path, offset: int) -> bool:
    """Whether a log may be larger than this: to open each log takes longer."""
    try:
        return log.lstat().st_size > offset
    except OSError:
        return False


def _kill_processes(job_id: str) -> None:
    processes.send_signals(processes.with_variable("CORTEX_JOB_ID", job_id), signal.SIGKILL)


def _ended(folder: Path, attempt: int) -> bool:
    """End a job that runs although its folder is missing.

    Returns:
        Whether it ran.
    """
    if not processes.with_variable("CORTEX_JOB_ID", folder.name):
        return False
    leftovers.end_leftovers(folder, attempt)
    return True
