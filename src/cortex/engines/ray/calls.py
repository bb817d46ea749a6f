"""What is asked of Ray and of a node for one attempt: a seat, the start, news, the stop, the rest of its log.
Called by `attempts`, which decides what follows from the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

import structlog

from cortex.engines.ray.cluster import ANSWER_S, RETRY_S, Cluster
from cortex.engines.ray.link import LinkError, Refused
from cortex.engines.ray.messages import Builds, Lock, LogPiece
from cortex.engines.ray.tracked import TrackedAttempt
from cortex.engines.ray.validation import checked_piece
from cortex.errors import StorageUnavailable

log = structlog.get_logger()

BUILD_S = 300.0  # a project travels
PLACE_S = 5.0
GPUS_S = 30.0  # which GPUs they are is told by a process of Ray's, which has to start first


class Locks(Protocol):
    """Who keeps the lock files of projects. Its methods block."""

    def locks(self, identity: str) -> dict[str, str]:
        """All of a project, by their names.

        Raises:
            StorageUnavailable, OSError: that cannot be told now.
        """

    def save_lockfile_if_absent(self, identity: str, name: str, text: str) -> None:
        """Keep one, if there is none of that name.

        Raises:
            StorageUnavailable, OSError: it is not kept.
        """


class AgentCalls:
    """What a method asks for, its node may have done also where it raises LinkError; where it raises
    Refused, it has not."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        grace_s: float,
        locks: Locks | None,
        builds: Builds,
    ) -> None:
        """
        Args:
            namespace: of this operator's seats.
            grace_s: between SIGTERM and SIGKILL.
            locks: None where nobody keeps any.
        """
        self._cluster = cluster
        self._namespace = namespace
        self._grace_s = grace_s
        self._locks = locks
        self._builds = builds

    async def take_seat(self, live: TrackedAttempt) -> tuple[int, ...]:
        """Let Ray hold what the attempt takes; the GPUs that it gives."""
        seat = live.seat(self._namespace)
        place_s = GPUS_S if "GPU" in seat.bundle else PLACE_S
        gpus = await self._cluster.call("take_seat", seat, place_s, within_s=place_s + ANSWER_S)
        assert isinstance(gpus, tuple)
        return gpus

    def seat(self, live: TrackedAttempt) -> str:
        """The name of its seat."""
        return live.seat(self._namespace).name

    async def give_up(self, seat: str) -> None:
        """Harmless for one that was given up. Returns once Ray knows it."""
        while True:
            try:
                await self._cluster.call("let_go", seat)
            except LinkError:
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def locks(self, live: TrackedAttempt) -> dict[str, str]:
        """The lock files of its project, by their names.

        Raises:
            StorageUnavailable, OSError: they cannot be told now.
        """
        if self._locks is None:
            return {}
        return await asyncio.to_thread(self._locks.locks, live.attempt.version.api.project_id)

    async def keep_lock(self, lock: Lock) -> None:
        """Keep what a node has told, if it can be kept now: with the next job it is told again."""
        if self._locks is None:
            return
        try:
            keep = self._locks.save_lockfile_if_absent
            await asyncio.to_thread(keep, lock.project_id, lock.name, lock.text)
        except (StorageUnavailable, OSError) as error:
            log.warning("a lock file cannot be kept", project=lock.project_id, error=str(error))

    async def start(
        self, live: TrackedAttempt, gpus: tuple[int, ...], locks: dict[str, str]
    ) -> bool:
        """Give the attempt to its node; False where that lacks the project, and nothing was begun."""
        order = live.order(self._namespace, self._grace_s, gpus, locks, self._builds)
        return await self._cluster.ask(live.node_id, "start", order) != "project"

    async def send_project(self, live: TrackedAttempt) -> None:
        api, project = live.attempt.version.api, live.attempt.version.project
        where = live.node_id, api.project_id, str(project)
        await self._cluster.call("send_project", *where, within_s=BUILD_S)

    async def ask_after(self, live: TrackedAttempt) -> None:
        """Let its node tell what there is of an attempt; one that never came there never will run."""
        order = live.order(self._namespace, self._grace_s)
        await self._cluster.ask(live.node_id, "recover", order)

    async def stop(self, live: TrackedAttempt) -> None:
        await self._cluster.ask(live.node_id, "stop", live.job_id)

    async def log_from(self, live: TrackedAttempt, offset: int) -> LogPiece:
        """A piece of the log that the node has; the empty one at its end."""
        limit = live.attempt.version.api.limits.log
        piece = await self._cluster.ask(live.node_id, "read", live.job_id, offset, limit)
        return checked_piece(piece)

    async def hint(self, node_id: str, method: str, *arguments: object) -> None:
        """Tell a node something that need not reach it."""
        with contextlib.suppress(LinkError, Refused):
            await self._cluster.ask(node_id, method, *arguments)
