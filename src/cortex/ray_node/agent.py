"""The agent of a node: a detached actor, which Ray restarts when it dies.

It runs the local engine in a folder of the node, and keeps the engine's observations until the
operator has received them. The Ray engine calls its public methods through the driver, by name.

Jobs do not depend on the agent: their supervisors continue without it, and a restarted agent
recovers them as an operator does on one machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from pathlib import Path

from ray.exceptions import RayError

import cortex
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
)
from cortex.engines.local import LocalEngine, leftovers, records
from cortex.engines.ray.messages import Hello, Lock, LogPiece, NodeOrder, Poll, Refusal
from cortex.projects.builder import EnvironmentFailed
from cortex.ray_node import reservations
from cortex.ray_node.logs import LogWatch, piece
from cortex.ray_node.outbox import Outbox
from cortex.ray_node.provisions import Provisions
from cortex.ray_node.workspace import AgentFolder
from cortex.system.folders import remove
from cortex.system.oserrors import is_shortage, is_storage
from cortex.worker import processes
from cortex.worker.supervisor import logfile

_BATCH = 256 << 10
_NO_RECORDS = "the folder of its node, with the job's records in it, is gone"
_RETRY_S = 5.0
# A poll of an operator that was killed may still run, and consume the event that wakes the next
# poll.
_LOOK_S = 1.0
_PAUSE_S = 0.05  # collects the lines of a growing log into one piece


class NodeEngine(LocalEngine):
    """The local engine of a node. The operator and Ray assign capacity and GPUs to each job."""

    def take(self, job_id: str, order: NodeOrder) -> None:
        self._grace_s = order.grace_s
        self._ledger.hold(job_id, order.api.compute, list(order.gpus))


class Agent:
    """The agent of one node."""

    def __init__(self, namespace: str, node_id: str, node_dir: str, total: Capacity) -> None:
        self._slot = AgentFolder.take(namespace, node_id, node_dir)
        self._opening = asyncio.Lock()
        self._engine = NodeEngine(self._slot.jobs, total)
        self._is_open = False
        self._stock = Provisions(self._slot, self._keep)
        self._seen = Outbox()
        self._news = asyncio.Event()  # set by each observation
        self._woken = asyncio.Event()  # set by each observation, and when a log grows
        self._live: dict[str, NodeOrder] = {}
        self._begun: dict[str, Started] = {}
        self._building: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._logs = LogWatch(self._woken.set)

    async def hello(self) -> Hello:
        await self._open()
        return Hello(
            version=cortex.__version__,
            incarnation=self._seen.greet(),
            root=self._slot.identity,
            local_handle=records.handle(),
            memory_limit=self._engine.capabilities.memory_limit,
            own_folder=self._engine.capabilities.own_folder,
            seq=self._seen.end,
        )

    async def start(self, order: NodeOrder) -> str | None:
        """Start an attempt.

        Returns:
            None; or "project" if the node lacks the project, which has to be sent first.

        Raises:
            Refusal: the node's folder is not the one that the order names.
            RuntimeError: an earlier attempt of the job has not ended yet. The operator
                then calls `recover`.
        """
        await self._open()
        job_id = order.spec.job_id
        self._check(order)
        if not self._stock.folder(order.api.project_id).is_dir():
            return "project"
        known = self._live.get(job_id)
        if known is not None and known.number != order.number:
            raise RuntimeError("an earlier attempt, whose order came late, is about to end")
        if known is None:
            self._live[job_id] = order
            self._building[job_id] = self._run(self._start(order, _deadline(order)))
        return None

    async def unpack(self, project_id: str, archive: bytes) -> None:
        """Store a project."""
        await self._open()
        await asyncio.to_thread(self._stock.take_in, project_id, archive)

    async def stop(self, job_id: str) -> None:
        await self._open()
        building = self._building.pop(job_id, None)
        if building is None:
            self._engine.stop(job_id)
            return
        building.cancel()
        await asyncio.gather(building, return_exceptions=True)
        if job_id in self._live:
            self._saw(NeverStarted(job_id, self._live[job_id].number))

    async def recover(self, order: NodeOrder) -> None:
        """Report the state of an attempt. An attempt that never reached the node is fenced.

        Raises:
            Refusal: the node's folder is not the one that the order names.
        """
        await self._open()
        job_id = order.spec.job_id
        self._check(order)
        known = self._live.get(job_id)
        if known is not None and known.number == order.number:
            if job_id in self._begun:
                self._keep(self._begun[job_id])
            return
        given_up = self._building.pop(job_id, None)
        if given_up is not None:  # from here on, log, stop and end belong to this attempt
            given_up.cancel()
        folder = self._slot.jobs / job_id
        self._live[job_id] = order
        if not folder.exists() and await asyncio.to_thread(_ended, folder, order.number):
            self._saw(Lost(job_id, order.number, _NO_RECORDS))
            return
        folder.mkdir(0o700, parents=True, exist_ok=True)
        self._logs.add(job_id, folder)
        await self._engine.recover(self._attempt(order, Path(), _deadline(order)))

    async def poll(
        self, incarnation: str, after: int, cursors: dict[str, int], within_s: float
    ) -> Poll:
        """Wait for observations, or for new pieces of logs.

        Args:
            incarnation: the session, from `hello`.
            after: the number of the first observation that the operator has not received.
            cursors: the offsets in the logs from which on to read, by job.
            within_s: how long to wait.

        Returns:
            The observations and pieces. A Poll without an incarnation says that the session has
            ended.
        """
        if not self._seen.knows(incarnation):
            return Poll("", after, ())
        self._seen.heard(incarnation, after)
        until = time.monotonic() + within_s
        while True:
            self._woken.clear()
            logs = await asyncio.to_thread(self._grown, cursors)
            left_s = until - time.monotonic()
            if logs or self._seen.end > after or left_s <= 0:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), min(left_s, _LOOK_S))
            if self._seen.end == after:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), _PAUSE_S)
        return Poll(incarnation, self._seen.end, self._seen.since(after), logs)

    async def read(self, job_id: str, offset: int, limit: int) -> LogPiece:
        return await asyncio.to_thread(piece, self._slot.jobs / job_id, offset, _BATCH, limit)

    async def forget(self, api_id: str) -> None:
        self._engine.forget(api_id)

    async def discard(self, job_ids: list[str]) -> None:
        for job_id in job_ids:
            if job_id not in self._live:
                await asyncio.to_thread(remove, self._slot.jobs / job_id)

    async def _open(self) -> None:
        # Each method may be the first: Ray may have restarted this process since the operator's
        # hello.
        async with self._opening:
            if not self._is_open:
                await asyncio.to_thread(self._stock.open)
                await self._engine.open(self._saw)
                self._logs.open()
                self._is_open = True

    def _check(self, order: NodeOrder) -> None:
        if order.root != self._slot.identity:
            raise Refusal(_NO_RECORDS)

    async def _start(self, order: NodeOrder, deadline: float | None) -> None:
        job_id = order.spec.job_id
        try:
            async with asyncio.timeout(order.left_s):
                python = await self._stock.build(order)
            self._begin_anew(job_id)
        except Exception as error:  # no caller awaits this task: every failure is reported
            self._building.pop(job_id, None)
            self._saw(self._failed(order, error))
        else:
            self._building.pop(job_id, None)  # from here on, the engine handles a stop
            self._engine.take(job_id, order)
            self._engine.start(self._attempt(order, python, deadline))

    def _failed(self, order: NodeOrder, error: Exception) -> Lost | NeverStarted:
        """The observation for a failure before the start of an attempt."""
        job_id, number = order.spec.job_id, order.number
        if isinstance(error, TimeoutError):
            return NeverStarted(job_id, number)  # the operator applies the deadline
        if isinstance(error, EnvironmentFailed):
            if error.is_temporary:
                words = "its node's disk is full, and the environment not built"
                return NeverStarted(job_id, number, words)
            with contextlib.suppress(OSError):
                self._begin_anew(job_id)
                self._engine.note(job_id, error.output)
            return Lost(job_id, number, error.reason, is_final=True)
        reason = f"it cannot be started on its node: {error}"
        if isinstance(error, OSError) and (is_storage(error) or is_shortage(error)):
            return NeverStarted(job_id, number, reason)
        return Lost(job_id, number, reason)

    def _begin_anew(self, job_id: str) -> None:
        """Begin a new log. The operator has copied all output of earlier attempts."""
        folder = self._slot.jobs / job_id
        folder.mkdir(0o700, parents=True, exist_ok=True)
        for name in (logfile.NAME, logfile.CUT):
            (folder / name).unlink(missing_ok=True)
        self._logs.add(job_id, folder)

    def _attempt(self, order: NodeOrder, python: Path, deadline: float | None) -> Attempt:
        version = Version(order.api, self._stock.folder(order.api.project_id), python, order.env)
        return Attempt(
            order.spec,
            version,
            order.number,
            order.local_handle,
            deadline,
            order.losses,
            order.lost,
        )

    def _grown(self, cursors: dict[str, int]) -> dict[str, LogPiece]:
        found = {}
        for job_id, offset in cursors.items():
            order = self._live.get(job_id)  # after the report of an end, the operator calls `read`
            if order is None:
                continue
            here = piece(self._slot.jobs / job_id, offset, _BATCH, order.api.limits.log)
            if here.end > offset:
                found[job_id] = here
        return found

    def _saw(self, observation: Observation) -> None:
        if isinstance(observation, CapacityFreed):
            return
        job_id = observation.job_id
        order = self._live.get(job_id)
        if order is None or order.number != observation.attempt:
            return  # an earlier attempt's, whose end the operator knows
        if isinstance(observation, Started):
            self._begun[job_id] = observation
        elif isinstance(observation, Ended | Lost | NeverStarted):
            del self._live[job_id]
            self._begun.pop(job_id, None)
            self._logs.remove(job_id)
            self._run(self._let_go(order.seat))
        self._keep(observation)

    async def _let_go(self, seat: str) -> None:
        while True:
            try:
                await asyncio.to_thread(reservations.let_go, seat)
            except RayError:
                await asyncio.sleep(_RETRY_S)
            else:
                return

    def _keep(self, seen: Observation | Lock) -> None:
        self._seen.add(seen)
        self._news.set()
        self._woken.set()

    def _run(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _deadline(order: NodeOrder) -> float | None:
    """The deadline by this machine's monotonic clock."""
    return None if order.left_s is None else time.monotonic() + order.left_s


def _ended(folder: Path, attempt: int) -> bool:
    """End a job whose folder is lost.

    Returns:
        Whether the job was running.
    """
    if not processes.with_variable("CORTEX_JOB_ID", folder.name):
        return False
    leftovers.clean(folder, attempt)
    return True
