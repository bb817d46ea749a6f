"""The reservations of one node: they inform the other users of the cluster of what this operator's
jobs take. The agent of the node keeps them.

Ray's head makes all reservations of a cluster one after another, and waits for a node that does not
answer (ray-project/ray#20477). A job therefore does not wait for its reservation, which follows its
start, unless it needs GPUs: Ray alone knows which are free. A reservation without a job is released
after a moment, and until then serves the next job that takes the same: a stream of short jobs costs
the head nothing.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import structlog
from ray.exceptions import RayError

from cortex.engines.base import NOTHING, Capacity
from cortex.engines.ray.ray_errors import explain
from cortex.ray_node import reservations

log = structlog.get_logger()

T = TypeVar("T")
_FAILURES = (RayError, RuntimeError, OSError, ValueError)
_BATCH_S = 0.2  # most jobs that end sooner need no reservation of their own
_IDLE_S = 2.0
_CHECK_INTERVAL_S = 1.0
_CREATE_TIMEOUT_S = 0.5
_RETRY_DELAY_S = 5.0
_GPU_TIMEOUT_S = 30.0
_GPU_CHECK_INTERVAL_S = 0.2
# After a restart of the agent, the operator first has to say which jobs still run.
_ADOPTION_S = 60.0
_THREADS = 8


class GpusUnavailable(Exception):
    """Ray has not reserved the GPUs of a job in time; the message says why."""


@dataclass
class _Held:
    """A reservation that Ray was asked for."""

    amount: Capacity
    is_created: bool = False
    last_use: float = 0.0
    request: asyncio.Future[bool] | None = None
    """The request to Ray, which a thread carries out even where no job waits for it any more."""

    @property
    def is_requested(self) -> bool:
        """Whether Ray has not answered the request yet."""
        return self.request is not None and not self.request.done()


class NodeReservations:
    """All methods are called on the agent's event loop."""

    def __init__(
        self,
        namespace: str,
        node_id: str,
        can_create: Callable[[], bool],
        on_change: Callable[[], None],
    ) -> None:
        """
        Args:
            namespace: the operator's; with the node's id, it begins the names of the reservations.
            node_id: the node's.
            can_create: whether the node's raylet answers. The head would wait for it otherwise.
            on_change: called when `held` has changed.
        """
        self._node_id = node_id
        self._namespace_prefix = f"{namespace}:"
        self._prefix = f"{namespace}:{node_id}:"
        self._can_create = can_create
        self._on_change = on_change
        self._wanted: dict[str, Capacity] = {}  # by job, without those that need GPUs
        self._held: dict[str, _Held] = {}  # by the reservation's name
        self._of_gpu_jobs: dict[str, str] = {}  # the reservation's name, by job
        # What other agents of the node have reserved is known only once it is adopted.
        self._is_adopted = False
        self._unmatched_gpu_jobs: set[str] = set()
        self._ended_gpu_jobs: set[str] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(_THREADS, "reservations")

    @property
    def held(self) -> Capacity:
        """What Ray has reserved on this node for this operator."""
        created = (held.amount for held in self._held.values() if held.is_created)
        return sum(created, NOTHING)

    @property
    def is_idle(self) -> bool:
        """Whether no job runs, and no reservation is left, also none of an earlier agent."""
        return self._is_adopted and not self._held and not self._wanted

    def open(self) -> None:
        """Keep the reservations up to date from now on."""
        self._changed.set()  # an earlier agent may have left reservations
        self._task = asyncio.get_running_loop().create_task(self._run(), name="reservations")

    async def close(self) -> None:
        """Stop. The reservations stay, for the next agent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._threads.shutdown(wait=False)

    def add(self, job_id: str, amount: Capacity) -> None:
        """A job runs on the node. If it has GPUs, an earlier agent has reserved them: they belong
        to that one reservation."""
        if amount == NOTHING:  # Ray has no empty reservations
            return
        if amount.gpu:
            self._unmatched_gpu_jobs.add(job_id)
            self._match_gpu_jobs()
        else:
            self._wanted[job_id] = amount
        self._changed.set()

    async def add_with_gpus(self, job_id: str, amount: Capacity) -> tuple[int, ...]:
        """Reserve what a job with GPUs takes.

        Returns:
            The indices of its GPUs.

        Raises:
            GpusUnavailable: Ray has not reserved them in time.
        """
        deadline = time.monotonic() + _GPU_TIMEOUT_S
        name = self._new_name(job_id)
        self._of_gpu_jobs[job_id] = name
        self._held[name] = held = _Held(amount)
        try:
            if not self._can_create():
                raise GpusUnavailable("the node's raylet does not answer")
            held.is_created = await self._create(name, held)
            while not held.is_created:
                if time.monotonic() > deadline:
                    raise GpusUnavailable("others have taken the free GPUs of its node")
                await asyncio.sleep(_GPU_CHECK_INTERVAL_S)
                found = await self._in_thread(reservations.find, name)
                held.is_created = found is not None and found.is_created
            self._on_change()
            return await self._in_thread(
                reservations.reserved_gpus, name, amount.gpu, _GPU_TIMEOUT_S
            )
        except _FAILURES as error:
            self._remove_gpus(job_id)
            raise GpusUnavailable(f"Ray did not reserve its GPUs: {explain(error)}") from error
        except BaseException:
            self._remove_gpus(job_id)
            raise

    def remove(self, job_id: str) -> None:
        """A job runs on the node no longer."""
        if self._wanted.pop(job_id, None) is not None:
            self._changed.set()
        else:
            self._remove_gpus(job_id)

    def _remove_gpus(self, job_id: str) -> None:
        self._unmatched_gpu_jobs.discard(job_id)
        if not self._is_adopted:
            self._ended_gpu_jobs.add(job_id)
        self._of_gpu_jobs.pop(job_id, None)
        for name, held in self._held.items():
            if _has_gpus_of(name, held, job_id):
                held.last_use = 0.0
                self._changed.set()

    def _match_gpu_jobs(self) -> None:
        for name, held in self._held.items():
            jobs = self._unmatched_gpu_jobs if held.is_created else ()
            for job_id in [each for each in jobs if _has_gpus_of(name, held, each)]:
                self._of_gpu_jobs[job_id] = name
                self._unmatched_gpu_jobs.discard(job_id)

    async def _run(self) -> None:
        delay_s: float | None = None
        failure = ""
        while True:
            try:
                async with asyncio.timeout(delay_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            await asyncio.sleep(_BATCH_S)
            try:
                if not self._is_adopted:
                    await self._adopt()
                await self._reconcile()
                delay_s = _CHECK_INTERVAL_S if self._is_unsettled() else None
                failure = ""
            except _FAILURES as error:
                if str(error) != failure:
                    failure = str(error)
                    log.warning("cannot reserve what the jobs of this node take", error=failure)
                self._is_adopted = False  # Ray may have made a reservation whose request has failed
                delay_s = _RETRY_DELAY_S

    async def _adopt(self) -> None:
        """Take over the reservations of an earlier agent of this node."""
        named = await self._in_thread(reservations.existing, self._namespace_prefix)
        # Before version 2 of the messages, the operator reserved, by names without the node's id.
        found = [
            each
            for each in named
            if each.name.startswith(self._prefix) or each.node_id == self._node_id
        ]
        for each in found:
            if each.name not in self._held:
                last_use = time.monotonic() + _ADOPTION_S - _IDLE_S
                held = self._held[each.name] = _Held(each.amount, each.is_created, last_use)
                if any(_has_gpus_of(each.name, held, job_id) for job_id in self._ended_gpu_jobs):
                    held.last_use = 0.0
        self._is_adopted = True
        self._ended_gpu_jobs.clear()
        self._match_gpu_jobs()
        if found:
            self._on_change()

    async def _reconcile(self) -> None:
        """Release what no job needs, and request what is lacking.

        Raises:
            _FAILURES: Ray has not done a part of it.
        """
        idle, lacking = self._assign()
        for name in idle:
            held = self._held[name]
            if held.is_requested:  # Ray might make it after its release
                continue
            is_kept = held.is_created and time.monotonic() - held.last_use < _IDLE_S
            # What is idle must not take the place of what is lacking.
            if not is_kept or (lacking and held.last_use <= time.monotonic()):
                await self._in_thread(reservations.release, name)
                del self._held[name]
                self._on_change()
        await self._check_pending()
        for amount in lacking:
            if not self._can_create():
                return
            name = self._new_name()
            self._held[name] = held = _Held(amount, last_use=time.monotonic())
            held.is_created = await self._create(name, held)
            if held.is_created:
                self._on_change()

    def _assign(self) -> tuple[list[str], list[Capacity]]:
        """The names of the reservations that no job needs, and what is not reserved yet."""
        lacking = Counter(self._wanted.values())
        of_gpu_jobs = set(self._of_gpu_jobs.values())
        idle = []
        for name, held in self._held.items():
            if name in of_gpu_jobs:
                continue
            if lacking[held.amount] > 0:
                lacking[held.amount] -= 1
                held.last_use = time.monotonic()
            else:
                idle.append(name)
        return idle, list(lacking.elements())

    async def _check_pending(self) -> None:
        of_gpu_jobs = set(self._of_gpu_jobs.values())
        for name, held in list(self._held.items()):
            if held.is_created or held.is_requested or name in of_gpu_jobs:
                continue
            found = await self._in_thread(reservations.find, name)
            if found is None:  # the request for it has failed
                del self._held[name]
            elif found.is_created:
                held.is_created = True
                self._on_change()

    def _is_unsettled(self) -> bool:
        """Whether a reservation is idle, pending or lacking."""
        held = Counter(each.amount for each in self._held.values() if each.is_created)
        wanted = Counter(self._wanted.values())
        wanted.update(self._held[name].amount for name in self._of_gpu_jobs.values())
        return held != wanted or len(self._held) != wanted.total()

    async def _create(self, name: str, held: _Held) -> bool:
        arguments = name, self._node_id, held.amount, _CREATE_TIMEOUT_S
        work = self._in_thread(reservations.create, *arguments)
        held.request = asyncio.ensure_future(work)
        held.request.add_done_callback(lambda made: made.cancelled() or made.exception())
        return await asyncio.shield(held.request)

    def _new_name(self, gpu_job: str = "") -> str:
        return f"{self._prefix}{gpu_job}:{uuid.uuid4().hex}"

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _has_gpus_of(name: str, held: _Held, job_id: str) -> bool:
    """Whether a reservation has the GPUs of a job, whose id is a part of its name."""
    return held.amount.gpu > 0 and job_id in name.split(":")
