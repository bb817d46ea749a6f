"""Copies the checkpoints of running jobs from their nodes into a store of the operator's, and finds
them there for the next attempt.

An agent offers an archive (`cortex.ray_node.checkpoints`), and keeps it until it has been copied.
`attempts` calls this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import structlog

from cortex.engines.ray.cluster import RETRY_DELAY_S, Cluster
from cortex.engines.ray.link import LinkError, Refused
from cortex.engines.ray.messages import PIECE_BYTES, Checkpoint
from cortex.engines.ray.tracked import TrackedAttempt
from cortex.engines.ray.transfers import temporary_file
from cortex.errors import StorageUnavailable
from cortex.system.background import Background, in_thread

log = structlog.get_logger()

STALL_TIMEOUT_S = 30.0
STORE_RETRY_DELAY_S = 10.0
MAX_COPIES = 8  # at a time
_CHUNK_BYTES = 1 << 20
_BATCH_BYTES = 8 * PIECE_BYTES  # in flight for each copy


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint from the store, and its archive in a file without a name, at its beginning."""

    checkpoint: Checkpoint
    file: IO[bytes]


class CheckpointStore(Protocol):
    """Keeps the last checkpoint of each job. Its methods block."""

    def save(self, checkpoint: Checkpoint, archive: IO[bytes]) -> None:
        """Store a checkpoint instead of the job's last one. A reader finds one of them whole.

        Raises:
            StorageUnavailable, OSError: the last one is still stored.
        """

    def fetch(self, job_id: str) -> StoredCheckpoint | None:
        """The last checkpoint of a job; None if there is none, or if it is damaged. The caller
        closes the file.

        Raises:
            StorageUnavailable, OSError: the store cannot be read now.
        """

    def remove(self, job_ids: Sequence[str]) -> None:
        """Remove the checkpoints of these jobs, if there are any.

        Raises:
            StorageUnavailable, OSError: some may be left.
        """


class _Superseded(Exception):
    """The agent has another archive of the job now, or none."""


class CheckpointCopies:
    """All methods are called on the event loop."""

    def __init__(self, cluster: Cluster, store: CheckpointStore | None, folder: Path) -> None:
        """
        Args:
            cluster: reaches the agents.
            store: keeps checkpoints; None keeps none.
            folder: where archives lie while they are copied.
        """
        self._cluster = cluster
        self._store = store
        self._folder = folder
        self._copies: dict[str, tuple[Checkpoint, asyncio.Task[None]]] = {}  # by job
        self._saved: set[str] = set()  # the jobs of which this engine has stored a checkpoint
        self._slots = asyncio.Semaphore(MAX_COPIES)
        self._background = Background("checkpoints of ended jobs were not removed")

    async def close(self) -> None:
        """Stop copying. The agents offer their archives to the next operator."""
        tasks = [task for _, task in self._copies.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._background.close()

    def copy(self, node_id: str, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint that a node offers, after an earlier one of the same job."""
        if self._store is None:
            return
        known, running = self._copies.get(checkpoint.job_id, (None, None))
        if known == checkpoint:
            return
        work = self._copy(self._store, node_id, checkpoint, running)
        task = asyncio.create_task(work, name=f"checkpoint of {checkpoint.job_id}")
        self._copies[checkpoint.job_id] = checkpoint, task
        task.add_done_callback(lambda done: self._done(checkpoint, done))

    async def stored(self, tracked: TrackedAttempt) -> StoredCheckpoint | None:
        """The last checkpoint of an attempt that was lost, for the one that follows it.

        Raises:
            StorageUnavailable, OSError: the store cannot be read now.
        """
        if self._store is None or not tracked.attempt.losses:
            return None
        _, running = self._copies.get(tracked.job_id, (None, None))
        if running is not None:
            await asyncio.wait({running})
        return await in_thread(self._store.fetch, tracked.job_id)

    def remove(self, tracked: TrackedAttempt) -> None:
        """The job has ended: no attempt follows. Retention removes what is left after a failure."""
        job_id = tracked.job_id
        if self._store is None or not (
            job_id in self._saved or job_id in self._copies or tracked.attempt.losses
        ):
            return
        self._saved.discard(job_id)
        self._background.run(self._remove(self._store, job_id))

    async def _remove(self, store: CheckpointStore, job_id: str) -> None:
        _, running = self._copies.get(job_id, (None, None))
        if running is not None:
            running.cancel()
            await asyncio.wait({running})
        with contextlib.suppress(StorageUnavailable, OSError):
            await in_thread(store.remove, [job_id])

    async def _copy(
        self,
        store: CheckpointStore,
        node_id: str,
        checkpoint: Checkpoint,
        before: asyncio.Task[None] | None,
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        about = {"job": checkpoint.job_id, "bytes": checkpoint.size}
        try:
            async with self._slots:
                with await in_thread(temporary_file, self._folder) as file:
                    await self._receive(node_id, checkpoint, file)
                    await self._save(store, checkpoint, file)
        except _Superseded:
            return
        except (LinkError, Refused, OSError, ValueError) as error:
            log.warning("checkpoint not copied", **about, reason=str(error))
            return
        self._saved.add(checkpoint.job_id)
        log.info("checkpoint stored", **about)
        with contextlib.suppress(LinkError, Refused):
            await self._cluster.call_agent(
                node_id, "drop_checkpoint", checkpoint.job_id, checkpoint.digest
            )

    async def _receive(self, node_id: str, checkpoint: Checkpoint, file: IO[bytes]) -> None:
        """Receive an archive, and check it.

        Raises:
            LinkError, Refused: the node does not send it; it offers it again to a new session.
            OSError: this machine cannot store it.
            ValueError: it is damaged.
        """
        for start in range(0, checkpoint.size, _BATCH_BYTES):
            end = min(start + _BATCH_BYTES, checkpoint.size)
            reads = (
                self._read(node_id, checkpoint, offset) for offset in range(start, end, PIECE_BYTES)
            )
            await in_thread(file.writelines, await asyncio.gather(*reads))
        digest = await in_thread(digest_of, file)
        if digest != checkpoint.digest:
            raise ValueError(f"it arrived damaged: its SHA-256 is {digest}")

    async def _read(self, node_id: str, checkpoint: Checkpoint, offset: int) -> bytes:
        """A piece of an archive. A call that fails is repeated for `STALL_TIMEOUT_S`."""
        stalls_at = time.monotonic() + STALL_TIMEOUT_S
        while True:
            try:
                data = await self._cluster.call_agent(
                    node_id, "read_checkpoint", checkpoint.job_id, checkpoint.digest, offset
                )
            except LinkError:
                is_lost = self._cluster.is_joined and node_id not in self._cluster.nodes.alive
                if is_lost or time.monotonic() >= stalls_at:
                    raise
                await asyncio.sleep(RETRY_DELAY_S)
                continue
            if data is None:
                raise _Superseded
            expected = min(PIECE_BYTES, checkpoint.size - offset)
            if not isinstance(data, bytes) or len(data) != expected:
                raise ValueError("the node sent a piece of another size")
            return data

    async def _save(self, store: CheckpointStore, checkpoint: Checkpoint, file: IO[bytes]) -> None:
        """Store an archive that has arrived, as soon as the store can be used: the node may be lost
        by then."""
        while True:
            try:
                await in_thread(store.save, checkpoint, file)
            except StorageUnavailable as error:
                log.warning("checkpoint not stored yet", job=checkpoint.job_id, error=str(error))
                await asyncio.sleep(STORE_RETRY_DELAY_S)
            else:
                return

    def _done(self, checkpoint: Checkpoint, task: asyncio.Task[None]) -> None:
        if self._copies.get(checkpoint.job_id) == (checkpoint, task):
            del self._copies[checkpoint.job_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the copy of a checkpoint failed", exc_info=error)


def digest_of(file: IO[bytes]) -> str:
    """The SHA-256 of a whole file, in hexadecimal. Its position is the beginning afterwards."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    file.seek(0)
    return digest.hexdigest()
