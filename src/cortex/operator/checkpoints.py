"""The last checkpoint of each job on a cluster that may get another attempt.

    <object store>/checkpoints/<job id>    where one is configured, else
    <data folder>/checkpoints/<job id>

A file is the archive, and a trailer of fixed length that says whose it is: one name for each job,
which one rename or one upload replaces. All methods block, and any thread may call them. The Ray
engine saves and fetches (it is an `engines.ray.checkpoints.CheckpointStore`), retention removes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import structlog

from cortex.engines.ray.checkpoints import StoredCheckpoint, digest_of
from cortex.engines.ray.messages import Checkpoint
from cortex.objects import ObjectStore
from cortex.spec.times import new_id

log = structlog.get_logger()

_OBJECTS = "checkpoints"
_TRAILER_BYTES = 512
_INCOMING = ".incoming-"


class Checkpoints:
    """The checkpoints of one data folder."""

    def __init__(self, root: Path, objects: ObjectStore | None) -> None:
        self._root = root
        self._objects = objects

    def remove_leftovers(self) -> None:
        """Remove what a killed operator has left."""
        for path in self._root.glob(f"{_INCOMING}*"):
            path.unlink(missing_ok=True)

    def save(self, checkpoint: Checkpoint, archive: IO[bytes]) -> None:
        """See `CheckpointStore.save`."""
        path = self._root / f"{_INCOMING}{new_id()}"
        trailer = json.dumps(
            {
                "v": 1,
                "attempt": checkpoint.attempt,
                "size": checkpoint.size,
                "digest": checkpoint.digest,
            }
        )
        try:
            with path.open("xb") as file:
                archive.seek(0)
                shutil.copyfileobj(archive, file)
                file.write(trailer.encode().ljust(_TRAILER_BYTES))
                file.flush()
                os.fsync(file.fileno())
            if self._objects is None:
                path.rename(self._root / checkpoint.job_id)
            else:
                self._objects.put(f"{_OBJECTS}/{checkpoint.job_id}", path)
        finally:
            path.unlink(missing_ok=True)

    def fetch(self, job_id: str) -> StoredCheckpoint | None:
        """See `CheckpointStore.fetch`."""
        file = self._opened(job_id)
        if file is None:
            return None
        try:
            checkpoint = _checkpoint(job_id, file)
            if digest_of(file) == checkpoint.digest:
                return StoredCheckpoint(checkpoint, file)
            reason = "its content has another SHA-256"
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error)
        except BaseException:
            file.close()
            raise
        file.close()
        log.error("a stored checkpoint is damaged, and not used", job=job_id, reason=reason)
        return None

    def remove(self, job_ids: Sequence[str]) -> None:
        """See `CheckpointStore.remove`."""
        for job_id in job_ids:
            (self._root / job_id).unlink(missing_ok=True)
        if self._objects is not None:
            self._objects.delete(f"{_OBJECTS}/{job_id}" for job_id in job_ids)

    def _opened(self, job_id: str) -> IO[bytes] | None:
        """A copy of a job's file, without a name."""
        path = self._root / f"{_INCOMING}{new_id()}"
        try:
            if self._objects is not None:
                if not self._objects.get(f"{_OBJECTS}/{job_id}", path):
                    return None
            else:
                with suppress(FileNotFoundError):
                    shutil.copyfile(self._root / job_id, path)
            return path.open("r+b") if path.exists() else None
        finally:
            path.unlink(missing_ok=True)


def _checkpoint(job_id: str, file: IO[bytes]) -> Checkpoint:
    """Read the trailer of a file, and cut it off.

    Raises:
        ValueError, KeyError, TypeError: the file is damaged.
    """
    size = max(0, os.fstat(file.fileno()).st_size - _TRAILER_BYTES)
    file.seek(size)
    about = json.loads(file.read(_TRAILER_BYTES))
    if about["size"] != size:
        raise ValueError(f"it has {size} bytes instead of {about['size']}")
    file.truncate(size)
    return Checkpoint(job_id, int(about["attempt"]), size, str(about["digest"]))
