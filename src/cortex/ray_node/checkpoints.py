"""The checkpoints of a node's jobs: what lies in `$CORTEX_JOB_DIR/checkpoint`. The agent calls it.

While a job runs that may get another attempt, its folder is packed after each change and offered to
the operator, which fetches the archive and keeps it: the node may vanish. A checkpoint of an
attempt elsewhere arrives as a project does, and is put into the job's folder before its start.

Only files and folders count. Links, devices, pipes and sockets are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import structlog

from cortex.engines.ray.messages import PIECE_BYTES, Checkpoint, NodeOrder
from cortex.errors import InvalidProject
from cortex.joblog.folders import JobFolders
from cortex.projects.pack import MAX_PROJECT_FILES, open_tar_gz
from cortex.projects.unpack import MAX_DEPTH, unpack
from cortex.spec.times import new_id
from cortex.system.background import Background, in_thread
from cortex.system.folders import remove
from cortex.worker import checks
from cortex.worker.supervisor.reuse import FILES

log = structlog.get_logger()

NAME = "checkpoint"
LOOK_INTERVAL_S = 15.0
SETTLE_S = 3.0
"""A folder that has not changed for so long is complete."""
OFFER_TIMEOUT_S = 600.0
"""An operator that has not fetched an archive for so long does not come for it."""
_MAX_RECORD_BYTES = 1 << 16
_FAST = 1  # gzip's level: checkpoints of models hardly compress
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Content = dict[str, tuple[int, int, int, int]]
"""The files and folders of a checkpoint, each with its inode, size, time of change and mode."""


class _TooLarge(Exception):
    """The folder is over a limit; the message says which."""


@dataclass(eq=False)
class _Offer:
    """An archive that the operator has not fetched yet."""

    checkpoint: Checkpoint
    path: Path
    timer: asyncio.TimerHandle


@dataclass(eq=False)
class _Watched:
    """A job whose checkpoints are packed."""

    order: NodeOrder
    seen: Content = field(default_factory=dict)
    """What the last look has found."""
    packed: Content = field(default_factory=dict)
    """What the last archive contains."""
    problem: str | None = None
    """What the job's log has last reported."""
    task: asyncio.Task[None] | None = None


@dataclass(frozen=True)
class _Received:
    """A checkpoint from elsewhere that has arrived, and why it cannot be used, if it cannot."""

    digest: str
    problem: str | None = None


class Checkpoints:
    """All methods without a note are called on the event loop."""

    def __init__(
        self, root: Path, folders: JobFolders, on_packed: Callable[[Checkpoint], None]
    ) -> None:
        """
        Args:
            root: for archives, on the file system of the jobs' folders.
            on_packed: called with each checkpoint that the operator can fetch, perhaps again.
        """
        self._root = root
        self._folders = folders
        self._on_packed = on_packed
        self._watched: dict[str, _Watched] = {}
        self._offers: dict[str, _Offer] = {}
        self._received: dict[str, _Received] = {}
        self._background = Background("the watch of a checkpoint failed")

    def open(self) -> None:
        """Remove what an earlier agent has left. Blocking."""
        remove(self._root)
        self._root.mkdir(0o700, exist_ok=True)

    async def close(self) -> None:
        """Watch no more."""
        for watched in self._watched.values():
            if watched.task is not None:
                watched.task.cancel()
        for offer in self._offers.values():
            offer.timer.cancel()
        await self._background.close()

    def watch(self, order: NodeOrder) -> None:
        """Pack the checkpoints of an attempt from now on, if another attempt may follow it."""
        known = self._watched.get(order.spec.job_id)
        if known is not None and known.order.number == order.number:
            return
        self._unwatch(order.spec.job_id)
        if order.api.retries <= order.losses:
            return
        watched = self._watched[order.spec.job_id] = _Watched(order)
        watched.task = asyncio.get_running_loop().create_task(self._watch(watched))

    def is_watched(self, job_id: str) -> bool:
        """Whether the checkpoints of a job are packed."""
        return job_id in self._watched

    def ended(self, job_id: str) -> None:
        """No attempt follows: drop what was packed. The files stay in the job's folder."""
        self._unwatch(job_id)
        self._drop(job_id)

    async def take_last(self, job_id: str) -> None:
        """Pack what an attempt has left that was lost, and of which no process runs any more. Its
        archive can be fetched for `OFFER_TIMEOUT_S`."""
        watched = self._unwatch(job_id)
        if watched is not None:
            with contextlib.suppress(_TooLarge, OSError):
                content = await in_thread(_content, self._folder(job_id), self._limit(watched))
                if content and content != watched.packed:
                    await self._pack(watched, content)

    def offer_again(self, job_id: str) -> None:
        """Another operator takes over: report what it may fetch."""
        if job_id in self._offers:
            self._on_packed(self._offers[job_id].checkpoint)

    async def read(self, job_id: str, digest: str, offset: int) -> bytes | None:
        """A piece of an archive; None where a later one has replaced it."""
        offer = self._offers.get(job_id)
        if offer is None or offer.checkpoint.digest != digest:
            return None
        try:
            return await in_thread(_read, offer.path, offset)
        except FileNotFoundError:
            return None

    def fetched(self, job_id: str, digest: str) -> None:
        """The operator has the archive."""
        offer = self._offers.get(job_id)
        if offer is not None and offer.checkpoint.digest == digest:
            self._drop(job_id)

    async def lacks(self, order: NodeOrder) -> bool:
        """Whether the checkpoint of an order has to be sent to this node. It does not where it has
        arrived, or where the same or a later attempt has run here, whose files are as new."""
        checkpoint = order.checkpoint
        if checkpoint is None:
            return False
        received = self._received.get(checkpoint.job_id)
        if received is not None and received.digest == checkpoint.digest:
            return False
        return await in_thread(self._last_attempt, checkpoint.job_id) < checkpoint.attempt

    def store(self, checkpoint: Checkpoint, limit: int, archive: IO[bytes]) -> None:
        """Unpack a checkpoint that has arrived, for `put_in_place`. Blocking, in any thread.

        Args:
            limit: the `limits.checkpoint` of the job's version.
        """
        target, problem = self._incoming(checkpoint.job_id), None
        with self._temporary() as folder:
            try:
                unpack(archive, folder, is_upload=True, max_bytes=limit)
            except InvalidProject as error:
                problem = str(error)
            else:
                remove(target)
                folder.rename(target)
        self._received[checkpoint.job_id] = _Received(checkpoint.digest, problem)

    async def put_in_place(self, order: NodeOrder) -> None:
        """Give the attempt of an order the checkpoint that has arrived for it, if one has.

        Raises:
            OSError: the disk does not accept it now.
        """
        checkpoint = order.checkpoint
        received = None if checkpoint is None else self._received.get(checkpoint.job_id)
        if checkpoint is None or received is None or received.digest != checkpoint.digest:
            return
        if received.problem is None:
            await in_thread(self._move_in, checkpoint.job_id)
        else:
            self._say(checkpoint.job_id, f"the checkpoint cannot be used: {received.problem}")
        self._received.pop(checkpoint.job_id, None)

    async def remove(self, job_id: str) -> None:
        """Remove all that is kept of a job beside its folder."""
        self.ended(job_id)
        if self._received.pop(job_id, None) is not None:
            await in_thread(remove, self._incoming(job_id))

    async def _watch(self, watched: _Watched) -> None:
        while True:
            try:
                is_settled = await self._look(watched)
            except OSError as error:
                is_settled = True
                self._note(watched, f"the checkpoint cannot be stored: {error.strerror or error}")
            except Exception as error:
                log.exception("the watch of a checkpoint failed")
                self._note(watched, f"the checkpoint cannot be stored: {error!r}")
                return
            await asyncio.sleep(LOOK_INTERVAL_S if is_settled else SETTLE_S)

    async def _look(self, watched: _Watched) -> bool:
        """Look at the folder, and pack it if it is complete and new.

        Returns:
            Whether nothing is to be done before the next change.
        """
        job_id, before = watched.order.spec.job_id, watched.seen
        try:
            content = await in_thread(_content, self._folder(job_id), self._limit(watched))
        except _TooLarge as error:
            self._note(
                watched, f"the checkpoint is not stored: {error}; the last complete one is kept"
            )
            return True
        watched.seen = content
        if not content or content == watched.packed:
            watched.problem = None
            return True
        # The operator fetches one archive at a time: it would never complete one otherwise.
        if content != before or job_id in self._offers:
            return False
        return await self._pack(watched, content)

    async def _pack(self, watched: _Watched, content: Content) -> bool:
        """Pack the folder, and offer it to the operator.

        Returns:
            Whether that was done; False where the folder has changed meanwhile.
        """
        job_id = watched.order.spec.job_id
        folder, path = self._folder(job_id), self._root / f"{job_id}.{new_id()}"
        limit = self._limit(watched)
        packed = await in_thread(_pack, folder, content, path, limit)
        if packed is None:
            return False
        if self._watched.get(job_id) not in (watched, None):  # it has another attempt
            path.unlink(missing_ok=True)
            return True
        checkpoint = Checkpoint(job_id, watched.order.number, *packed)
        watched.packed, watched.problem = content, None
        self._drop(job_id)
        timer = asyncio.get_running_loop().call_later(OFFER_TIMEOUT_S, self._expire, job_id)
        self._offers[job_id] = _Offer(checkpoint, path, timer)
        self._on_packed(checkpoint)
        return True

    def _unwatch(self, job_id: str) -> _Watched | None:
        watched = self._watched.pop(job_id, None)
        if watched is not None and watched.task is not None:
            watched.task.cancel()
        return watched

    def _drop(self, job_id: str) -> None:
        offer = self._offers.pop(job_id, None)
        if offer is not None:
            offer.timer.cancel()
            offer.path.unlink(missing_ok=True)

    def _expire(self, job_id: str) -> None:
        """Pack again what the operator has not fetched: it may come for the next archive."""
        self._drop(job_id)
        if job_id in self._watched:
            self._watched[job_id].packed = {}

    def _note(self, watched: _Watched, problem: str) -> None:
        """Say in the job's log what prevents a copy, once."""
        if problem != watched.problem:
            watched.problem = problem
            self._say(watched.order.spec.job_id, problem)

    def _say(self, job_id: str, text: str) -> None:
        with contextlib.suppress(OSError):
            self._folders.append_to_log(job_id, f"cortex: {text}")

    def _move_in(self, job_id: str) -> None:
        incoming, target = self._incoming(job_id), self._folder(job_id)
        if incoming.is_dir():
            target.parent.mkdir(0o755, parents=True, exist_ok=True)
            remove(target)  # of an attempt before that of the checkpoint
            incoming.rename(target)

    def _last_attempt(self, job_id: str) -> int:
        """The last attempt of a job that has begun on this node; 0 if there is none."""
        begun = [0]
        for path in self._folders.folder(job_id).glob("start.*"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if not json.loads(_head(path)).get("fenced"):
                    begun.append(int(path.suffix[1:]))
        return max(begun)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        path = self._root / f"incoming.{new_id()}"
        try:
            yield path
        finally:
            remove(path)

    def _incoming(self, job_id: str) -> Path:
        return self._root / f"{job_id}.received"

    def _folder(self, job_id: str) -> Path:
        return self._folders.folder(job_id) / FILES / NAME

    def _limit(self, watched: _Watched) -> int:
        return watched.order.api.limits.checkpoint


def _content(folder: Path, limit: int) -> Content:
    """The files and folders of a checkpoint; empty if there is none.

    Raises:
        _TooLarge: they are over a limit.
        OSError: they cannot be read.
    """
    content: Content = {}
    total = 0
    pending = [("", folder)]
    while pending:
        prefix, path = pending.pop()
        try:
            if not stat.S_ISDIR(path.lstat().st_mode):
                continue
            with os.scandir(path) as entries:
                found = list(entries)
        except FileNotFoundError:  # removed meanwhile, or never made
            continue
        for entry in found:
            name = f"{prefix}{entry.name}"
            try:
                about = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            is_folder = stat.S_ISDIR(about.st_mode)
            if name.count("/") >= MAX_DEPTH or not (is_folder or stat.S_ISREG(about.st_mode)):
                continue
            if is_folder:
                content[name] = (about.st_ino, 0, 0, about.st_mode)
                pending.append((f"{name}/", path / entry.name))
            else:
                content[name] = _identity(about)
                total += about.st_size
            if total > limit:
                raise _TooLarge(f"it is over limits.checkpoint, {checks.size(limit)}")
            if len(content) > MAX_PROJECT_FILES:
                raise _TooLarge(f"it has over {MAX_PROJECT_FILES:,} files and folders")
    return content


def _pack(folder: Path, content: Content, path: Path, limit: int) -> tuple[int, str] | None:
    """Write the archive of a checkpoint.

    Returns:
        its size and its SHA-256; None where the folder has changed meanwhile, and nothing is left.

    Raises:
        OSError: this machine cannot store it; nothing is left.
    """
    is_complete = False
    try:
        with path.open("wb") as out:
            try:
                with open_tar_gz(out, _FAST) as tar:
                    is_complete = all(
                        _add(tar, folder, name, about) for name, about in sorted(content.items())
                    )
            except (EOFError, tarfile.TarError):
                is_complete = False
        try:
            is_complete = is_complete and _content(folder, limit) == content
        except _TooLarge:
            is_complete = False
        if not is_complete:
            return None
        with path.open("rb") as archive:
            return path.stat().st_size, hashlib.file_digest(archive, "sha256").hexdigest()
    except BaseException:
        is_complete = False
        raise
    finally:
        if not is_complete:
            path.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, folder: Path, name: str, about: tuple[int, int, int, int]) -> bool:
    """Add a file or a folder to an archive; whether it is what a look has found."""
    member = tarfile.TarInfo(name)
    _, size, _, mode = about
    if stat.S_ISDIR(mode):
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(member)
        return True
    try:
        fd = os.open(folder / name, _OPEN)
    except OSError:
        return False
    with os.fdopen(fd, "rb") as file:
        if _identity(os.fstat(fd)) != about:
            return False
        member.size, member.mode = size, 0o755 if mode & stat.S_IXUSR else 0o644
        try:
            tar.addfile(member, file)
        except OSError:
            if os.fstat(fd).st_size < size:  # it has become shorter
                return False
            raise
        return _identity(os.fstat(fd)) == about


def _identity(about: os.stat_result) -> tuple[int, int, int, int]:
    return about.st_ino, about.st_size, about.st_mtime_ns, about.st_mode


def _read(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), PIECE_BYTES, offset)


def _head(path: Path) -> bytes:
    with os.fdopen(os.open(path, _OPEN), "rb") as file:
        return file.read(_MAX_RECORD_BYTES)
