"""A log that is removed, created or cut while it is read; and the gap of a log that was cut."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from cortex.joblog import reader
from cortex.joblog.reader import Log, Piece
from cortex.joblog.watch import FileWatch
from cortex.operator.http.routes import logs
from cortex.operator.logs import follow
from cortex.worker.messages import LogCut

LIMIT = 1 << 20


def no_writer() -> None:
    """The job has ended."""


class Running:
    """A running job that does not change."""

    async def changed(self) -> None:
        await asyncio.Event().wait()


@asynccontextmanager
async def watching() -> AsyncIterator[FileWatch]:
    watcher = FileWatch("log watch")
    watcher.open()
    try:
        yield watcher
    finally:
        await watcher.close()


def test_a_log_that_is_removed_while_it_is_read_ends_with_a_line_that_says_so(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * (logs._CHUNK_BYTES + 1))

    async def read() -> list[bytes]:
        pieces = []
        async for piece in logs._from_offset(Log(log, LIMIT), 0, log.stat().st_size):
            pieces.append(piece)
            log.unlink(missing_ok=True)
        return pieces

    first, last = asyncio.run(read())
    assert len(first) == logs._CHUNK_BYTES
    assert last == b"[cortex: the log was removed while it was read]\n"


def test_a_range_of_a_log_that_is_removed_while_it_is_read_breaks_off(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * (logs._CHUNK_BYTES + 1))
    parts = logs._exact_range(Log(log, LIMIT), 0, log.stat().st_size)
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)
        if "body" in message:
            log.unlink(missing_ok=True)

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    asyncio.run(logs.LogAnswer(parts, 206)({"type": "http"}, receive, send))
    assert [message.get("more_body") for message in sent] == [None, True]


def test_a_log_that_is_removed_while_it_is_followed_ends_with_a_line_that_says_so(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * (follow._CHUNK_BYTES + 1))

    async def followed_pieces() -> list[tuple[int, str] | None]:
        pieces = []
        async with watching() as watcher:
            async for piece in follow.follow(Log(log, LIMIT), 0, no_writer, watcher):
                pieces.append(piece)
                log.unlink(missing_ok=True)
        return pieces

    end = follow._CHUNK_BYTES
    assert asyncio.run(followed_pieces()) == [(end, "x" * end), (end, reader.REMOVED)]


@pytest.mark.parametrize(
    "cut",
    [
        b"[" * 4000,
        b"[]",
        b'{"start": 1, "end": 1e3, "limit": 1}',
        b'{"start": 3, "end": 1, "limit": 1}',
        b'{"start": 1, "end": %d, "limit": 1}' % 10**30,
    ],
)
def test_a_forged_cut_record_is_ignored(tmp_path: Path, cut: bytes) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"abc")
    (tmp_path / "log.cut").write_bytes(cut)

    async def followed() -> list[str]:
        async with watching() as watcher:
            pieces = follow.follow(Log(log, LIMIT), 0, no_writer, watcher)
            return [piece[1] async for piece in pieces if piece is not None]

    assert reader.read(Log(log, LIMIT), 0, 10).data == b"abc"
    assert asyncio.run(followed()) == ["abc"]


def test_a_log_that_appears_between_the_read_and_the_watch_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, read = tmp_path / "log", reader.read

    def create_after_the_read(of: Log, offset: int, size: int) -> Piece:
        found = read(of, offset, size)
        log.open("a").close()
        return found

    async def followed_pieces() -> tuple[int, str] | None:
        async with watching() as watcher:
            pieces = follow.follow(Log(log, LIMIT), 0, Running, watcher)
            first = asyncio.ensure_future(anext(pieces))
            while not watcher._watched:  # noqa: ASYNC110  # no event reports it
                await asyncio.sleep(0.01)
            log.write_text("first")
            return await first

    monkeypatch.setattr(follow, "read", create_after_the_read)
    assert asyncio.run(asyncio.wait_for(followed_pieces(), 60)) == (5, "first")


def test_a_cancelled_follower_leaves_no_waiting_task(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first")

    async def followed_pieces() -> set[str]:
        async with watching() as watcher:
            before = asyncio.all_tasks()
            pieces = follow.follow(Log(log, LIMIT), 0, Running, watcher)
            await anext(pieces)
            second = asyncio.ensure_future(anext(pieces))
            while not asyncio.all_tasks() - before - {second}:  # noqa: ASYNC110  # no event reports it
                await asyncio.sleep(0.01)
            second.cancel()
            await asyncio.wait({second})
            await asyncio.sleep(0)
            return {repr(task) for task in asyncio.all_tasks() - before}

    assert asyncio.run(followed_pieces()) == set()


LARGEST = (1 << 63) - 1


def test_the_largest_possible_file_is_read_to_its_end() -> None:
    """tmpfs allows such a file. The kernel refuses a read whose range ends beyond the largest
    offset."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        log = Log(Path(folder) / "log", LIMIT)
        log.path.write_bytes(b"first\n")
        os.truncate(log.path, LARGEST)
        text, offset = b"", 0
        while (piece := reader.read(log, offset, 1 << 18)).data:
            text, offset = text + piece.data, piece.end
        assert offset == LARGEST
        assert text.startswith(b"first\n")
        assert len(text) < LIMIT + (1 << 18)
        assert b"of the log are gone" in text


def cut(start: int, end: int) -> bytes:
    return LogCut(start=start, end=end, limit=1).dumps()


@pytest.mark.parametrize(
    ("record", "size", "expected"),
    [
        (None, 0, None),
        (None, LIMIT, None),
        (cut(1, 9), 8, None),
        (cut(1, 9), 9, (1, 9)),
        (cut(100, 5 * LIMIT), 6 * LIMIT, (100, 5 * LIMIT)),
        (b"{}", LIMIT, None),
    ],
)
def test_a_possible_cut_record_gives_the_gap_of_a_log(
    record: bytes | None, size: int, expected: tuple[int, int] | None
) -> None:
    found = reader.find_gap(record, size, LIMIT)
    assert (found and (found.start, found.end)) == expected
    assert found is None or found.limit == LIMIT


@pytest.mark.parametrize(
    "record", [None, b"{}", cut(1, 2), cut(0, LIMIT), cut(9 * LIMIT, 9 * LIMIT + 1)]
)
@pytest.mark.parametrize("size", [10 * LIMIT, LARGEST])
@pytest.mark.parametrize("attempts", [1, 3])
def test_a_gap_leaves_no_more_than_the_limit_of_the_log(
    record: bytes | None, size: int, attempts: int
) -> None:
    found = reader.find_gap(record, size, LIMIT, attempts)
    assert found is not None
    assert 0 <= found.start < found.end <= size
    assert found.start + size - found.end <= attempts * LIMIT + (128 << 10)
