"""Large bodies of submits are read in processes of their own: the interpreter does nothing else while it parses, and
10 MiB of JSON take up to a second. Nothing of the operator's but the text of the config is as large then.

A process is started when it is needed, reads one body after another, and ends after a time without any, or when
the operator does. It runs this module: what a body is, and what comes of it, go through its standard streams.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from cortex.errors import Busy, CortexError, from_response
from cortex.operator.http.bodies import Submitted, parse
from cortex.system.background import in_thread

LARGE_BYTES = 64 * 1024
"""A longer body is not read on the event loop: up to here that takes a few milliseconds, whatever is in it."""

_IDLE_S = 60.0
_NICE = 5  # what is small goes first
_MAX_PROCESSES = max(1, min(4, len(os.sched_getaffinity(0)) // 2))


class BodyReader:
    """All methods are called on the event loop."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(_MAX_PROCESSES)
        self._idle: list[_Process] = []
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, body: list[bytes], *, form_type: str | None, hashed: bool) -> Submitted:
        """What a body says, in however many parts it came.

        Raises:
            UnsupportedMediaType, InvalidRequest: as `bodies.parse` does.
            Busy: the machine has no room for a process that reads it.
        """
        if sum(map(len, body)) <= LARGE_BYTES:
            return parse(b"".join(body), form_type=form_type, hashed=hashed)
        async with self._room:
            if self._idle:
                process = self._idle.pop()
                with suppress(OSError):  # it was killed since
                    return await self._by(process, body, form_type=form_type, hashed=hashed)
            try:
                return await self._by(_Process(), body, form_type=form_type, hashed=hashed)
            except OSError as error:
                raise Busy(
                    f"there is no room to read a large body now ({error}); submit it again later"
                ) from error

    async def _by(
        self, process: _Process, body: list[bytes], *, form_type: str | None, hashed: bool
    ) -> Submitted:
        try:
            found = await in_thread(process.read, body, form_type=form_type, hashed=hashed)
        except asyncio.CancelledError:
            process.kill()
            raise
        self._idle.append(process)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(_IDLE_S, self.close)
        if isinstance(found, CortexError):
            raise found
        return found

    def close(self) -> None:
        """End the processes that have nothing to read."""
        if self._timer is not None:
            self._timer.cancel()
        while self._idle:
            self._idle.pop().end()


class _Process:
    """One that reads bodies, started at the first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def read(
        self, body: list[bytes], *, form_type: str | None, hashed: bool
    ) -> Submitted | CortexError:
        """What comes of a body.

        Raises:
            OSError: the process cannot be started, or has ended; nothing is left of it.
        """
        try:
            return self._ask(body, {"form_type": form_type, "hashed": hashed})
        except OSError:
            self.end()
            raise

    def kill(self) -> None:
        """Let `read`, which another thread is in, come to an end."""
        if self._process is not None:
            self._process.kill()

    def end(self) -> None:
        """End it, and let go of it."""
        if self._process is None:
            return
        self._process.kill()
        with suppress(OSError), self._process:  # which closes its streams, and waits for its end
            return

    def _ask(self, body: list[bytes], question: dict[str, object]) -> Submitted | CortexError:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd="/",
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        _write(self._process.stdin, question, *body)
        answer, config = _read(self._process.stdout)
        if "kind" in answer:
            return from_response(answer["status"], answer["kind"], answer["message"])
        return Submitted(answer["timeout"], config.decode("ascii"), answer["digest"])


def serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Read bodies until there are no more."""
    with suppress(BrokenPipeError):
        while True:
            question, body = _read(questions)
            try:
                found = parse(body, form_type=question["form_type"], hashed=question["hashed"])
            except CortexError as error:
                refusal = {
                    "status": error.http_status,
                    "kind": error.kind,
                    "message": error.message,
                }
                _write(answers, refusal)
                continue
            answer = {"timeout": found.timeout, "digest": found.digest}
            _write(answers, answer, found.config.encode("ascii"))


def _write(stream: IO[bytes], head: Mapping[str, object], *parts: bytes) -> None:
    size = sum(map(len, parts))
    stream.write(json.dumps({**head, "size": size}).encode() + b"\n")
    for part in parts:
        stream.write(part)
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    line = stream.readline()
    head = json.loads(line) if line.endswith(b"\n") else {"size": 1}
    data = stream.read(head["size"])
    if len(data) < head["size"]:
        raise BrokenPipeError(errno.EPIPE, "the process that reads it has ended")
    return head, data


if __name__ == "__main__":
    os.nice(_NICE)
    gc.disable()  # what is read holds no cycles, and may be a million objects
    serve(sys.stdin.buffer, sys.stdout.buffer)
