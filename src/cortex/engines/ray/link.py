"""The operator's side of its link to a Ray cluster: a process of its own (`cortex.ray_node.driver`) that is
Ray's driver. Called by the Ray engine alone.

Ray ends a driver that has lost its cluster for long, and blocks one that joins a dead one: neither may
happen to the operator. Such a process is replaced; the agents and the jobs know nothing of it.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO

from cortex.worker.messages import shorten

HEAD = struct.Struct("!IQ")
DRIVER = "cortex.ray_node.driver"
KNOCK_S = 5.0
_STACK = re.compile(r"\(\+0x|^\s*$|^\s|^\*\*\*")


class LinkError(Exception):
    """The cluster, or a node of it, cannot be asked now: whether it did what it was asked is not known."""


class Refused(Exception):
    """A node has been asked, and did not do it."""


@dataclass(frozen=True)
class Answer:
    """What the driver says to a request."""

    value: object = None
    unreachable: str | None = None
    refused: str | None = None


class Link:
    """One driver process from start to end. All of it happens on the event loop."""

    def __init__(self, address: str, namespace: str, node_dir: str | None) -> None:
        self._address = address
        self._arguments = [address, namespace, node_dir or ""]
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._next = 1
        self._errors: IO[bytes] | None = None
        self.gone = asyncio.Event()

    async def open(self, within_s: float) -> None:
        """Start the process, and wait until it has joined the cluster.

        Raises:
            LinkError: it has not within this time, and why; the process is gone.
        """
        await self._knock()
        ours, theirs = socket.socketpair()
        joined: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[0] = joined
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        try:
            reader, self._writer = await asyncio.open_connection(sock=ours)
            self._process = await asyncio.to_thread(self._popen, theirs)
        except OSError as error:
            ours.close()
            await self.close()
            raise LinkError(f"the process that talks to Ray cannot be started: {error}") from error
        except BaseException:
            await self.close()  # it ends by itself, should it come to be: its socket is closed
            raise
        finally:
            theirs.close()
        self._reader_task = asyncio.create_task(self._read(reader), name="ray link")
        try:
            answer = await asyncio.wait_for(joined, within_s)
        except TimeoutError:
            await self.close()
            raise LinkError(f"it did not answer within {within_s:g} s") from None
        except BaseException:
            await self.close()
            raise
        if answer.unreachable is not None:
            await self.close()
            raise LinkError(answer.unreachable)

    async def call(self, method: str, *arguments: object, within_s: float) -> object:
        """Let the driver do something in the cluster.

        Raises:
            LinkError: nothing is known of what came of it.
            Refused: it was not done.
        """
        if self._writer is None or self.gone.is_set():
            raise LinkError(f"the Ray cluster at {self._address} cannot be reached")
        number, self._next = self._next, self._next + 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            data = pickle.dumps((method, arguments))
            self._writer.write(HEAD.pack(len(data), number) + data)
            answer = await asyncio.wait_for(future, within_s)
        except TimeoutError:
            raise LinkError(f"no answer from the Ray cluster within {within_s:g} s") from None
        finally:
            self._waiting.pop(number, None)
        if answer.unreachable is not None:
            raise LinkError(answer.unreachable)
        if answer.refused is not None:
            raise Refused(answer.refused)
        return answer.value

    async def close(self) -> None:
        """End the process, and wait until it is gone. What agents do goes on."""
        self.gone.set()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is not None:
            self._process.kill()  # it holds nothing
            await asyncio.to_thread(self._process.wait)
        if self._reader_task is not None and self._reader_task is not asyncio.current_task():
            self._reader_task.cancel()
            await asyncio.gather(self._reader_task, return_exceptions=True)
        self._give_up("the link to the Ray cluster was closed")
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    async def _knock(self) -> None:
        """Ray tries for long where nothing answers at all.

        Raises:
            LinkError: nothing does.
        """
        host, _, port = self._address.rpartition(":")
        try:
            async with asyncio.timeout(KNOCK_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, TimeoutError) as error:
            raise LinkError(f"nothing answers there ({str(error) or 'no answer'})") from error
        writer.close()

    def _popen(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", DRIVER, str(theirs.fileno()), *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                length, number = HEAD.unpack(await reader.readexactly(HEAD.size))
                answer = pickle.loads(await reader.readexactly(length))
                future = self._waiting.get(number)
                if future is not None and not future.done():
                    future.set_result(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
            self._give_up(f"the link to the Ray cluster broke: {self._last_words()}")

    def _give_up(self, reason: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_result(Answer(unreachable=reason))

    def _last_words(self) -> str:
        if self._errors is None:
            return "it was closed"
        end = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, end - 16000))
        text = self._errors.read().decode("utf-8", "replace")
        lines = [line for line in text.splitlines() if not _STACK.search(line)]
        return shorten(lines[-1], 300) if lines else "its process ended without a word"
