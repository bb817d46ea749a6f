"""A job's log, read on its node in pieces and copied to the operator."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cortex.engines.ray.log_copies import LogCopies
from cortex.engines.ray.messages import Lock, LogPiece
from cortex.engines.ray.validation import checked_lock, checked_piece
from cortex.operator.logs.follow import Log, read
from cortex.ray_node.logs import piece
from cortex.worker.checks import Invalid
from cortex.worker.messages import LogCut

MOST = 64
LIMIT = 4096


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "node" / "job").mkdir(parents=True)
    return tmp_path / "node" / "job"


def copy(node: Path, mirror: LogCopies, base: int = 0) -> None:
    """As the engine does, until there is no more."""
    while True:
        offset = mirror.size("job") - base
        found = piece(node, offset, MOST, LIMIT)
        if found.end == offset:
            return
        mirror.write("job", base, found)


@pytest.mark.parametrize("lost", [1, 5, 500])
def test_a_copy_whose_beginning_was_lost_goes_on_at_its_place(
    node: Path, tmp_path: Path, lost: int
) -> None:
    mirror = LogCopies(tmp_path / "operator")
    mirror.take_up("job", lost)
    assert mirror.size("job") == lost
    (node / "log").write_bytes(b"what came after\n" * 20)
    copy(node, mirror, base=lost)
    text = shown(mirror)
    assert text[lost:] == b"what came after\n" * 20
    assert text[lost - 1 : lost] == b"\n"
    mirror.take_up("job", lost)
    assert shown(mirror) == text


def shown(mirror: LogCopies) -> bytes:
    text, offset = b"", 0
    while (found := read(Log(mirror.path("job"), LIMIT), offset, 1 << 20)).data:
        text, offset = text + found.data, found.end
    return text


def test_a_copy_grows_with_its_log(node: Path, tmp_path: Path) -> None:
    mirror = LogCopies(tmp_path / "copies")
    mirror.prepare("job")
    copy(node, mirror)
    assert not mirror.path("job").exists()
    for text in ("ä" * 100, "\nmore\n", "x" * 1000):
        with (node / "log").open("a") as file:
            file.write(text)
        copy(node, mirror)
        assert mirror.path("job").read_bytes() == (node / "log").read_bytes()


def test_a_second_attempt_goes_on_where_the_first_ended(node: Path, tmp_path: Path) -> None:
    mirror = LogCopies(tmp_path / "copies")
    mirror.append("job", "first")
    base = mirror.prepare("job")
    (node / "log").write_text("second\n")
    copy(node, mirror, base)
    assert mirror.path("job").read_text() == "first\nsecond\n"


def cut(node: Path, start: int, end: int) -> None:
    """As a job's supervisor does with a log over its limit."""
    (node / "log.cut").write_bytes(LogCut(start=start, end=end, limit=LIMIT).dumps())
    with (node / "log").open("r+b") as file:
        file.seek(start)
        file.write(b"\0" * (end - start))


@pytest.mark.parametrize("copied", [0, 50, 4000, 9000])
def test_what_a_log_has_lost_is_lost_in_the_copy_too(
    node: Path, tmp_path: Path, copied: int
) -> None:
    mirror = LogCopies(tmp_path / "copies")
    mirror.append("job", "before")
    base = mirror.prepare("job")
    text = b"".join(b"%04d\n" % number for number in range(2000))
    (node / "log").write_bytes(text[:copied])
    copy(node, mirror, base)
    (node / "log").write_bytes(text)
    cut(node, 100, 8000)
    copy(node, mirror, base)
    with (node / "log").open("ab") as file:
        file.write(b"end\n")
    copy(node, mirror, base)
    told = shown(mirror)
    assert told.startswith(b"before\n" + text[:100] + b"[cortex: 7.7 KiB of the log are gone")
    assert told.endswith(text[8000:] + b"end\n")
    assert mirror.size("job") == base + len(text) + 4


def test_the_gaps_of_two_attempts_are_one(node: Path, tmp_path: Path) -> None:
    mirror = LogCopies(tmp_path / "copies")
    mirror.prepare("job")
    text = b"".join(b"%04d\n" % number for number in range(2000))
    for base in (0, len(text)):
        (node / "log").write_bytes(text)
        cut(node, 100, 8000)
        copy(node, mirror, base)
        (node / "log.cut").unlink()
    told = shown(mirror)
    assert told.startswith(text[:100] + b"[cortex: ")
    assert told.endswith(b"are gone: limits.log is 4 KiB]\n" + text[8000:])
    assert b"\0" not in told


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"nonsense",
        b'{"start": "a", "end": "b", "limit": 1}',
        b'{"start": 0, "end": 1000000000000000000, "limit": 1}',
        b'{"start": 3, "end": 2, "limit": 1}',
    ],
)
def test_a_job_that_writes_the_record_itself_harms_nobody(
    node: Path, tmp_path: Path, record: bytes
) -> None:
    mirror = LogCopies(tmp_path / "copies")
    mirror.prepare("job")
    (node / "log").write_text("text\n")
    (node / "log.cut").write_bytes(record)
    copy(node, mirror)
    assert shown(mirror) == b"text\n"


def test_a_link_in_the_place_of_a_log_is_not_followed(node: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (node / "log").symlink_to(secret)
    assert piece(node, 0, MOST, LIMIT).data == b""
    (node / "log").unlink()
    os.mkfifo(node / "log")
    assert piece(node, 0, MOST, LIMIT).data == b""


def test_of_a_log_as_large_as_a_file_can_be_no_more_is_copied_than_its_limit_allows(
    node: Path, tmp_path: Path
) -> None:
    mirror = LogCopies(tmp_path / "copies")
    mirror.prepare("job")
    (node / "log").write_text("first\n")
    os.truncate(node / "log", 1 << 43)
    copy(node, mirror)
    told = shown(mirror)
    assert told.startswith(b"first\n")
    assert b"are gone: limits.log is 4 KiB]" in told
    assert len(told) < 1 << 18
    assert mirror.path("job").stat().st_blocks * 512 < 1 << 18


def odd_pieces() -> list[object]:
    piece = LogPiece(0, b"abc", 3, None)
    odd: list[dict[str, Any]] = [
        {"data": "abc"}, {"offset": -1}, {"end": 2},
        {"end": 1 << 62}, {"offset": 1.0}, {"offset": True},
    ]  # fmt: skip
    return [None, *(replace(piece, **each) for each in odd)]


@pytest.mark.parametrize("number", range(len(odd_pieces())))
def test_a_piece_that_is_none_is_refused(number: int) -> None:
    with pytest.raises(Invalid):
        checked_piece(odd_pieces()[number])
    sound = LogPiece(3, b"abc", 9, None)
    assert checked_piece(sound) is sound


def test_a_lock_file_gets_a_name_of_its_own_alone() -> None:
    lock = Lock("ab12", "linux-x86_64-3.11.lock", "a==1\n")
    assert checked_lock(lock) == lock
    odd = [
        {"project_id": "../x"}, {"project_id": "a/b"}, {"project_id": 1}, {"name": "../x.lock"},
        {"name": "x"}, {"name": ".lock"}, {"name": "a/b.lock"}, {"name": None}, {"text": 1},
        {"text": "x" * (1 << 23)},
    ]  # fmt: skip
    for changed in odd:
        with pytest.raises(Invalid):
            checked_lock(replace(lock, **changed))  # type: ignore[arg-type]  # that is what is tried
    assert checked_lock(replace(lock, text="\ud800")).text == "\\ud800"
