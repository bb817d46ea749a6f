"""The operator's link to a Ray cluster: a process of its own is Ray's driver.

Its code is `cortex.ray_node.driver`. Ray ends a driver that has been without its cluster for long,
and blocks a driver that joins a dead cluster. Neither may happen to the operator. `cluster`
replaces such a process; agents and jobs do not depend on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO

import structlog

from cortex.engines.ray.ray_errors import explain_output
from cortex.system.background import in_thread

log = structlog.get_logger()

HEAD = struct.Struct("!IQ")
DRIVER = "cortex.ray_node.driver"
CONNECT_TIMEOUT_S = 5.0
_REAP_TIMEOUT_S = 1.0
_LOG_INTERVAL_S = (
    60.0  # between two log entries about the same failure, which may repeat each second
)
_MAX_LOGGED = 1000
_MAX_OUTPUT_BYTES = 16000


class LinkError(Exception):
    """The cluster or a node does not answer. The outcome of the request is unknown."""


class NotSent(LinkError):
    """The cluster or a node cannot be reached. The request was certainly not sent."""


class Refused(Exception):
    """A node, or the cluster, has answered that it has not carried out the request."""


@dataclass(frozen=True)
class Answer:
    """The driver's response to a request: a value, or the reason of a LinkError or a Refused."""

    value: object = None
    unreachable: str | None = None
    is_sent: bool = True
    """Whether the request may have been sent on; False makes the LinkError a NotSent."""
    refused: str | None = None
    detail: str | None = None
    """The whole text of Ray behind the reason, for the operator's log."""


class Link:
    """One driver process, from its start to its end, on the event loop."""

    def __init__(self, address: str, namespace: str, node_dir: str | None) -> None:
        self._address = address
        self._arguments = [address, namespace, node_dir or ""]
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._next_number = 1
        self._logged_at: dict[tuple[object, ...], float] = {}
        self._output: IO[bytes] | None = None
        self.closed = asyncio.Event()
        self._problem: str | None = None  # why it was closed

    async def open(self, timeout_s: float) -> None:
        """Start the process, and wait until it has joined the cluster.

        Raises:
            LinkError: the process has not joined in time, and has been ended; the message says why.
            Refused: the cluster has other versions of Ray or Python; the process has been ended.
        """
        await self._check_address()
        ours, theirs = socket.socketpair()
        joined: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[0] = joined
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        try:
            reader, self._writer = await asyncio.open_connection(sock=ours)
            self._process = await in_thread(self._popen, theirs)
        except OSError as error:
            ours.close()
            await self.close()
            raise LinkError(f"cannot start the process of the Ray driver: {error}") from error
        except BaseException:
            # If the thread still starts the process, it ends by itself: its socket is closed.
            await self.close()
            raise
        finally:
            theirs.close()
        self._reader_task = asyncio.create_task(self._read(reader), name="ray link")
        try:
            answer = await asyncio.wait_for(joined, timeout_s)
        except TimeoutError:
            await self.close()
            raise LinkError(f"it did not answer within {timeout_s:g} s") from None
        except BaseException:
            await self.close()
            raise
        if answer.unreachable is not None or answer.refused is not None:
            self._log_detail("open", (), answer)
            await self.close()
        if answer.refused is not None:
            raise Refused(answer.refused)
        if answer.unreachable is not None:
            raise LinkError(answer.unreachable)

    async def call(self, method: str, *arguments: object, timeout_s: float) -> object:
        """Call a method of the driver.

        Raises:
            NotSent: the request was not sent.
            LinkError: the outcome is unknown.
            Refused: the request was not carried out.
        """
        if self._writer is None or self.closed.is_set():
            raise NotSent(self._problem or f"the Ray cluster at {self._address} cannot be reached")
        number = self._next_number
        self._next_number += 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            data = pickle.dumps((method, arguments))
            self._writer.write(HEAD.pack(len(data), number) + data)
            # In Python 3.11 `asyncio.wait_for` may swallow a cancellation.
            async with asyncio.timeout(timeout_s):
                answer = await future
        except TimeoutError:
            raise LinkError(f"the Ray cluster did not answer within {timeout_s:g} s") from None
        finally:
            self._pending.pop(number, None)
        self._log_detail(method, arguments, answer)
        if answer.unreachable is not None:
            raise (LinkError if answer.is_sent else NotSent)(answer.unreachable)
        if answer.refused is not None:
            raise Refused(answer.refused)
        return answer.value

    async def close(self) -> None:
        """Kill the process, and wait for its end. Agents continue."""
        self.closed.set()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is not None:
            self._process.kill()  # it has no state to save
            try:
                await in_thread(self._process.wait)
            except OSError:  # no thread is left to wait in
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_REAP_TIMEOUT_S)
        if self._reader_task is not None and self._reader_task is not asyncio.current_task():
            self._reader_task.cancel()
            await asyncio.gather(self._reader_task, return_exceptions=True)
        self._fail_pending("the link to the Ray cluster was closed")
        if self._output is not None:
            self._output.close()
            self._output = None

    def _log_detail(self, method: str, arguments: tuple[object, ...], answer: Answer) -> None:
        """Log the whole text of a failure of Ray, which messages to users leave out."""
        if answer.detail is None:
            return
        reason = answer.unreachable or answer.refused
        about = arguments[0] if arguments and isinstance(arguments[0], str) else None
        key, now = (method, about, reason), time.monotonic()
        if now - self._logged_at.get(key, -_LOG_INTERVAL_S) < _LOG_INTERVAL_S:
            return
        if len(self._logged_at) >= _MAX_LOGGED:
            self._logged_at.clear()
        self._logged_at[key] = now
        log.warning(
            "ray reports a failure", method=method, about=about, reason=reason, detail=answer.detail
        )

    async def _check_address(self) -> None:
        """Check that the address accepts connections: Ray would retry for long.

        Raises:
            LinkError: nothing answers there.
        """
        host, _, port = self._address.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, TimeoutError) as error:
            raise LinkError(f"nothing answers there ({str(error) or 'no answer'})") from error
        except RuntimeError as error:  # no thread can be started now, to look up the host's name
            raise LinkError(f"cannot look up its host: {error}") from error
        writer.close()

    def _popen(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", DRIVER, str(theirs.fileno()), *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                length, number = HEAD.unpack(await reader.readexactly(HEAD.size))
                answer = pickle.loads(await reader.readexactly(length))
                future = self._pending.get(number)
                if future is not None and not future.done():
                    future.set_result(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            output = "" if self.closed.is_set() else self._last_output()
            self.closed.set()
            if output:
                log.warning("the process of the Ray driver has ended", output=output)
            reason = explain_output(output) or "the process of the Ray driver has ended"
            self._fail_pending(f"the link to the Ray cluster broke: {reason}")

    def _fail_pending(self, reason: str) -> None:
        self._problem = self._problem or reason
        for future in self._pending.values():
            if not future.done():
                future.set_result(Answer(unreachable=reason))

    def _last_output(self) -> str:
        if self._output is None:
            return ""
        end = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, end - _MAX_OUTPUT_BYTES))
        return self._output.read().decode("utf-8", "replace")
