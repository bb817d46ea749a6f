"""Parses large bodies of submits in separate processes.

The interpreter does nothing else while it parses, and 10 MiB of JSON take up to a second. Of a
large body, only the text of the config reaches the operator's memory in full size.

A process is started on demand, parses one body after another, and ends after a minute without work
or together with the operator. It runs this module; requests and results pass through its standard
streams.
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
from cortex.operator.http.bodies import ParsedSubmission, parse_submission
from cortex.system.background import in_thread

LARGE_BYTES = 64 * 1024
"""The event loop parses bodies up to this size, which takes a few milliseconds whatever they
contain."""

_IDLE_TIMEOUT_S = 60.0
_NICENESS = 5  # small bodies come first
_MAX_PROCESSES = max(1, min(4, len(os.sched_getaffinity(0)) // 2))


class BodyReader:
    """Parses bodies. All methods are called on the event loop."""

    def __init__(self) -> None:
        self._process_limit = asyncio.Semaphore(_MAX_PROCESSES)
        self._idle: list[_Process] = []
        self._idle_timer: asyncio.TimerHandle | None = None

    async def read(
        self, body: list[bytes], *, form_type: str | None, with_digest: bool
    ) -> ParsedSubmission:
        """Parse a body, given in any number of parts.

        Raises:
            UnsupportedMediaType, InvalidRequest: as `bodies.parse_submission` does.
            Busy: the machine has no room for a process that parses a large body.
        """
        if sum(map(len, body)) <= LARGE_BYTES:
            return parse_submission(b"".join(body), form_type=form_type, with_digest=with_digest)
        async with self._process_limit:
            if self._idle:
                process = self._idle.pop()
                with suppress(OSError):  # the process was killed while it was idle
                    return await self._parse_in(
                        process, body, form_type=form_type, with_digest=with_digest
                    )
            try:
                return await self._parse_in(
                    _Process(), body, form_type=form_type, with_digest=with_digest
                )
            except OSError as error:
                raise Busy(
                    f"there is no room to read a large body right now ({error}); submit it again "
                    "later"
                ) from error

    async def _parse_in(
        self, process: _Process, body: list[bytes], *, form_type: str | None, with_digest: bool
    ) -> ParsedSubmission:
        try:
            result = await in_thread(
                process.parse, body, form_type=form_type, with_digest=with_digest
            )
        except asyncio.CancelledError:
            process.kill()
            raise
        self._idle.append(process)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._idle_timer = asyncio.get_running_loop().call_later(_IDLE_TIMEOUT_S, self.close)
        if isinstance(result, CortexError):
            raise result
        return result

    def close(self) -> None:
        """End the idle processes."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        while self._idle:
            self._idle.pop().end()


class _Process:
    """A process that parses bodies. It is started for the first body."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def parse(
        self, body: list[bytes], *, form_type: str | None, with_digest: bool
    ) -> ParsedSubmission | CortexError:
        """Parse a body. Blocks: run it in a thread.

        Raises:
            OSError: the process cannot be started, or has ended. It is cleaned up.
        """
        try:
            return self._exchange(body, {"form_type": form_type, "with_digest": with_digest})
        except OSError:
            self.end()
            raise

    def kill(self) -> None:
        """Kill the process; `parse`, which runs in another thread, then fails."""
        if self._process is not None:
            self._process.kill()

    def end(self) -> None:
        """Kill the process, wait for its end, and close its streams."""
        if self._process is None:
            return
        self._process.kill()
        with suppress(OSError), self._process:  # leaving Popen's context waits and closes
            return

    def _exchange(
        self, body: list[bytes], request: dict[str, object]
    ) -> ParsedSubmission | CortexError:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd="/",
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        _write(self._process.stdin, request, *body)
        result, config = _read(self._process.stdout)
        if "kind" in result:
            return from_response(result["status"], result["kind"], result["message"])
        return ParsedSubmission(result["timeout"], config.decode("ascii"), result["digest"])


def serve(requests: IO[bytes], results: IO[bytes]) -> None:
    """Parse bodies until the operator closes the stream: the main function of the process."""
    with suppress(BrokenPipeError):
        while True:
            request, body = _read(requests)
            try:
                parsed = parse_submission(
                    body, form_type=request["form_type"], with_digest=request["with_digest"]
                )
            except CortexError as error:
                refusal = {
                    "status": error.http_status,
                    "kind": error.kind,
                    "message": error.message,
                }
                _write(results, refusal)
                continue
            result = {"timeout": parsed.timeout, "digest": parsed.digest}
            _write(results, result, parsed.config.encode("ascii"))


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
        raise BrokenPipeError(errno.EPIPE, "the process that parses bodies has ended")
    return head, data


if __name__ == "__main__":
    os.nice(_NICENESS)
    gc.disable()  # parsed JSON has no cycles, and may have a million objects
    serve(sys.stdin.buffer, sys.stdout.buffer)
