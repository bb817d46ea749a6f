"""Projects and checkpoints that arrive at a node in pieces. The agent calls it.

Each transfer has a file of its own, so that two operators may send the same project.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from cortex.engines.ray.messages import Refusal
from cortex.ray_node.provisions import Provisions
from cortex.system.background import in_thread

# The sender gives up earlier, or begins again.
IDLE_TIMEOUT_S = 120.0
T = TypeVar("T")


@dataclass(eq=False)
class _Incoming:
    file: contextlib.ExitStack
    path: Path
    fd: int
    timer: asyncio.TimerHandle
    install: asyncio.Task[None] | None = None


class IncomingArchives:
    """The transfers to one node, on the event loop."""

    def __init__(self, provisions: Provisions) -> None:
        self._provisions = provisions
        self._incoming: dict[str, _Incoming] = {}

    async def begin(self, name: str) -> None:
        """Begin a transfer. A second call does nothing.

        Raises:
            Refusal: this machine cannot store a file now.
        """
        if name in self._incoming:
            return
        stack = contextlib.ExitStack()
        path = stack.enter_context(self._provisions.incoming())
        with stack:  # closes what a failure leaves
            fd = await _stored(_create, path)
            stack.callback(os.close, fd)
            if name not in self._incoming:  # a repeated call may have been faster
                self._incoming[name] = _Incoming(stack.pop_all(), path, fd, self._timer(name))

    async def receive(self, name: str, offset: int, data: bytes) -> bool:
        """Store a piece. A second call with the same piece does nothing.

        Returns:
            Whether the transfer is known; False where another agent had begun it.

        Raises:
            Refusal: this machine cannot store the piece now; the transfer has ended.
        """
        incoming = self._incoming.get(name)
        if incoming is None:
            return False
        self._restart_timer(name, incoming)
        fd = os.dup(incoming.fd)  # the transfer may end while a thread writes
        try:
            await _stored(_write, fd, data, offset)
        except Refusal:
            self._end(name)
            raise
        finally:
            os.close(fd)
        return True

    async def install(
        self,
        name: str,
        size: int,
        digest: str,
        within_s: float,
        store: Callable[[IO[bytes]], None],
    ) -> bool | None:
        """Check an archive whose pieces have all been received, and let `store` unpack it in a
        thread.

        Returns:
            True where it is stored; False where the transfer is not known, as where another agent
            had begun it; None where that takes longer than `within_s`, and the caller has to call
            again.

        Raises:
            Refusal: the archive is damaged, or this machine cannot store it now; the transfer has
                ended.
            InvalidProject: the archive is invalid; the transfer has ended.
        """
        incoming = self._incoming.get(name)
        if incoming is None:
            return False
        self._restart_timer(name, incoming)
        if incoming.install is None:
            work = _stored(_check_and_store, incoming.path, size, digest, store)
            incoming.install = asyncio.create_task(work)
        done, _ = await asyncio.wait({incoming.install}, timeout=within_s)
        if not done:
            return None
        self._end(name)
        incoming.install.result()
        return True

    def _timer(self, name: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(IDLE_TIMEOUT_S, self._expire, name)

    def _restart_timer(self, name: str, incoming: _Incoming) -> None:
        incoming.timer.cancel()
        incoming.timer = self._timer(name)

    def _expire(self, name: str) -> None:
        incoming = self._incoming[name]
        if incoming.install is not None and not incoming.install.done():
            self._restart_timer(name, incoming)
        else:
            self._end(name)

    def _end(self, name: str) -> None:
        incoming = self._incoming.pop(name, None)
        if incoming is not None:
            incoming.timer.cancel()
            incoming.file.close()


def _check_and_store(
    path: Path, size: int, digest: str, store: Callable[[IO[bytes]], None]
) -> None:
    with path.open("rb") as archive:
        found = hashlib.file_digest(archive, "sha256").hexdigest()
        if archive.tell() != size or found != digest:
            raise Refusal(
                f"its files arrived damaged: {archive.tell()} bytes with SHA-256 {found}, "
                f"instead of {size} with {digest}"
            )
        archive.seek(0)
        store(archive)


async def _stored(work: Callable[..., T], *arguments: object) -> T:
    """Run blocking work that writes to this machine's disk.

    Raises:
        Refusal: the disk does not accept it now.
    """
    try:
        return await in_thread(work, *arguments)
    except OSError as error:
        raise Refusal(f"its node cannot store its files: {error.strerror or error}") from error


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _write(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
