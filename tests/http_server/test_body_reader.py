"""Large bodies are read in processes of their own, which may be killed, or not to be had."""

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
SAID = ParsedSubmission(7, json.dumps(CONFIG, separators=(",", ":")))


def with_reader(work: Callable[[BodyReader], Awaitable[None]]) -> None:
    async def main() -> None:
        reader = BodyReader()
        try:
            await work(reader)
        finally:
            reader.close()
        assert processes() == []

    asyncio.run(main())


def processes() -> list[int]:
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


def test_one_process_reads_one_after_another_and_small_ones_need_none() -> None:
    async def work(reader: BodyReader) -> None:
        assert await read(reader, b'{"timeout": 7}') == ParsedSubmission(7, "{}")
        assert processes() == []
        for _ in range(3):
            assert await read(reader) == SAID
        assert len(processes()) == 1

    with_reader(work)


def test_one_that_is_killed_while_it_waits_or_reads_is_replaced() -> None:
    async def work(reader: BodyReader) -> None:
        assert await read(reader) == SAID
        os.kill(processes()[0], signal.SIGKILL)
        assert await read(reader) == SAID
        (pid,) = processes()
        os.kill(pid, signal.SIGSTOP)
        reading = asyncio.create_task(read(reader))
        await asyncio.sleep(
            0.1
        )  # by then it is most likely in the middle; both ways come to the same
        os.kill(pid, signal.SIGKILL)
        assert await reading == SAID

    with_reader(work)


def test_nothing_is_left_of_one_whose_client_has_gone() -> None:
    async def work(reader: BodyReader) -> None:
        assert await read(reader) == SAID
        os.kill(processes()[0], signal.SIGSTOP)
        reading = asyncio.create_task(read(reader))
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        async with asyncio.timeout(60):
            while processes():  # noqa: ASYNC110  # it is another process
                await asyncio.sleep(0.02)
        assert await read(reader) == SAID

    with_reader(work)


def test_without_room_for_a_process_it_is_said_and_passes() -> None:
    async def work(reader: BodyReader) -> None:
        await asyncio.to_thread(int)  # a thread needs descriptors of its own
        with no_descriptors(), pytest.raises(Busy, match="Too many open files"):
            await read(reader)
        assert await read(reader) == SAID

    with_reader(work)


def test_one_that_has_had_nothing_to_read_for_a_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_reader, "_IDLE_TIMEOUT_S", 0.05)

    async def work(reader: BodyReader) -> None:
        assert await read(reader) == SAID
        async with asyncio.timeout(60):
            while processes():  # noqa: ASYNC110  # it is another process
                await asyncio.sleep(0.02)

    with_reader(work)
