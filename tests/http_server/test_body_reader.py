"""Separate processes read large bodies; they can be killed, or fail to start."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from cortex.errors import Busy
from cortex.operator.http import body_reader
from cortex.operator.http.bodies import ParsedSubmission
from cortex.operator.http.body_reader import LARGE_BYTES, BodyReader

CONFIG = {"text": "x" * LARGE_BYTES}
BODY = json.dumps({"timeout": 7, "config": CONFIG}).encode()
PARSED = ParsedSubmission(7, json.dumps(CONFIG, separators=(",", ":")))


def run_with_reader(work: Callable[[BodyReader], Awaitable[None]]) -> None:
    async def main() -> None:
        reader = BodyReader()
        try:
            await work(reader)
        finally:
            reader.close()
        assert reader_processes() == []

    asyncio.run(main())


def reader_processes() -> list[int]:
    command = ["pgrep", "-P", str(os.getpid()), "-f", "cortex.operator.http.body_reader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


async def read(reader: BodyReader, body: bytes = BODY) -> ParsedSubmission:
    parts = [body[:1000], body[1000:]]
    return await reader.read(parts, form_type=None, with_digest=False)


@contextmanager
def no_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_one_process_reads_large_bodies_in_turn_and_small_ones_need_none() -> None:
    async def work(reader: BodyReader) -> None:
        assert await read(reader, b'{"timeout": 7}') == ParsedSubmission(7, "{}")
        assert reader_processes() == []
        for _ in range(3):
            assert await read(reader) == PARSED
        assert len(reader_processes()) == 1

    run_with_reader(work)


def test_a_reader_killed_while_idle_or_reading_is_replaced() -> None:
    async def work(reader: BodyReader) -> None:
        assert await read(reader) == PARSED
        os.kill(reader_processes()[0], signal.SIGKILL)
        assert await read(reader) == PARSED
        (pid,) = reader_processes()
        os.kill(pid, signal.SIGSTOP)
        reading = asyncio.create_task(read(reader))
        # By then it most likely reads the body; the result is the same if not.
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        assert await reading == PARSED

    run_with_reader(work)


def test_a_cancelled_read_ends_its_process() -> None:
    async def work(reader: BodyReader) -> None:
        assert await read(reader) == PARSED
        os.kill(reader_processes()[0], signal.SIGSTOP)
        reading = asyncio.create_task(read(reader))
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        async with asyncio.timeout(60):
            while reader_processes():  # noqa: ASYNC110  # another process changes it
                await asyncio.sleep(0.02)
        assert await read(reader) == PARSED

    run_with_reader(work)


def test_a_read_without_free_descriptors_is_refused_and_the_next_one_succeeds() -> None:
    async def work(reader: BodyReader) -> None:
        await asyncio.to_thread(int)  # starts the thread of the read now: a start needs descriptors
        with no_descriptors(), pytest.raises(Busy, match="Too many open files"):
            await read(reader)
        assert await read(reader) == PARSED

    run_with_reader(work)


def test_an_idle_reader_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_reader, "_IDLE_TIMEOUT_S", 0.05)

    async def work(reader: BodyReader) -> None:
        assert await read(reader) == PARSED
        async with asyncio.timeout(60):
            while reader_processes():  # noqa: ASYNC110  # another process changes it
                await asyncio.sleep(0.02)

    run_with_reader(work)
