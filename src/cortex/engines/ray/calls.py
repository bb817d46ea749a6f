"""The requests for one attempt, to the agent of its node.

`attempts` makes them, and decides what follows.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

import structlog

from cortex.engines.ray.cluster import Cluster
from cortex.engines.ray.link import LinkError, Refused
from cortex.engines.ray.messages import Builds, Checkpoint, Lock, LogPiece
from cortex.engines.ray.tracked import TrackedAttempt
from cortex.engines.ray.validation import checked_log_piece
from cortex.errors import StorageUnavailable
from cortex.system.background import in_thread

log = structlog.get_logger()

_SLOW_ORDER_S = 4.0


class Locks(Protocol):
    """The store of the projects' lock files. Its methods block, unless they say otherwise."""

    def locks(self, identity: str) -> dict[str, str]:
        """The lock files of a project, by name.

        Raises:
            StorageUnavailable, OSError: the store cannot be read now.
        """

    def known_locks(self, identity: str) -> dict[str, str] | None:
        """The same, without blocking; None where `locks` has to read them.

        Raises:
            OSError: the store cannot be read now.
        """

    def save_lockfile_if_absent(self, identity: str, name: str, text: str) -> None:
        """Store a lock file, unless the project has one of that name.

        Raises:
            StorageUnavailable, OSError: the store cannot be written now.
        """


class AgentCalls:
    """The requests of the Ray engine.

    Where a method raises LinkError, the request may have been carried out or not. Where it raises
    Refused, the request was not carried out.
    """

    def __init__(
        self,
        cluster: Cluster,
        grace_s: float,
        locks: Locks | None,
        builds: Builds,
    ) -> None:
        """
        Args:
            cluster: reaches Ray and the agents.
            grace_s: the seconds between SIGTERM and SIGKILL.
            locks: stores lock files; None stores none.
            builds: limits builds of environments on nodes.
        """
        self._cluster = cluster
        self.grace_s = grace_s
        self._locks = locks
        self._builds = builds

    async def lock_files(self, tracked: TrackedAttempt) -> dict[str, str]:
        """The lock files of the attempt's project, by name.

        Raises:
            StorageUnavailable, OSError: the store cannot be read now.
        """
        if self._locks is None:
            return {}
        identity = tracked.attempt.version.api.project_id
        known = self._locks.known_locks(identity)
        return await in_thread(self._locks.locks, identity) if known is None else known

    async def store_lock_file(self, lock: Lock) -> None:
        """Store a lock file from a node. After a failure, the node sends it with the next job."""
        if self._locks is None:
            return
        try:
            store = self._locks.save_lockfile_if_absent
            await in_thread(store, lock.project_id, lock.name, lock.text)
        except (StorageUnavailable, OSError) as error:
            log.warning("cannot store a lock file", project=lock.project_id, error=str(error))

    async def start(
        self, tracked: TrackedAttempt, locks: dict[str, str], checkpoint: Checkpoint | None
    ) -> str | None:
        """Order the node to start the attempt.

        Returns:
            None where the node has accepted it, else what it lacks: "project" or "checkpoint".
        """
        order = tracked.node_order(self.grace_s, locks, self._builds, checkpoint)
        suspect = asyncio.get_running_loop().call_later(
            _SLOW_ORDER_S,
            self._cluster.suspect,
            tracked.node_id,
            "its agent does not take orders",
        )
        try:
            answer = await self._cluster.call_agent(tracked.node_id, "start", order)
        finally:
            suspect.cancel()
        self._cluster.trust(tracked.node_id)
        return str(answer) if answer in {"project", "checkpoint"} else None

    async def recover(self, tracked: TrackedAttempt) -> None:
        """Make the node report the state of the attempt, and fence an attempt that it never got."""
        order = tracked.node_order(self.grace_s)
        await self._cluster.call_agent(tracked.node_id, "recover", order)

    async def stop(self, tracked: TrackedAttempt, grace_s: float | None = None) -> None:
        """Order the node to stop the attempt.

        Args:
            grace_s: the seconds between SIGTERM and SIGKILL; None for those of the order.
        """
        await self._cluster.call_agent(tracked.node_id, "stop", tracked.job_id, grace_s)

    async def read_log(self, tracked: TrackedAttempt, offset: int) -> LogPiece:
        """A piece of the node's log from an offset on; an empty piece at the end of the log.

        Raises:
            checks.Invalid: the node sent an invalid piece.
        """
        limit = tracked.attempt.version.api.limits.log
        piece = await self._cluster.call_agent(
            tracked.node_id, "read", tracked.job_id, offset, limit
        )
        return checked_log_piece(piece)

    async def hint(self, node_id: str, method: str, *arguments: object) -> None:
        """Send a node a hint, which may get lost."""
        with contextlib.suppress(LinkError, Refused):
            await self._cluster.call_agent(node_id, method, *arguments)
