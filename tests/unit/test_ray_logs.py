"""A job's log, read on its node in pieces and copied to the operator."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cortex.engines.ray.mirror import Mirror
from cortex.node.logs import piece
from cortex.operator.logs import Log, read
from cortex.worker.messages import LogCut

MOST = 64
LIMIT = 4096


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "node" / "job").mkdir(parents=True)
    return tmp_path / "node" / "job"


def copy(node: Path, mirror: Mirror, base: int = 0) -> None:
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
    mirror = Mirror(tmp_path / "operator")
    mirror.take_up("job", lost)
    assert mirror.size("job") == lost
    (node / "log").write_bytes(b"what came after\n" * 20)
    copy(node, mirror, base=lost)
    text = shown(mirror)
    assert text[lost:] == b"what came after\n" * 20
    assert text[lost - 1 : lost] == b"\n"
    mirror.take_up("job", lost)
    assert shown(mirror) == text


def shown(mirror: Mirror) -> bytes:
    text, offset = b"", 0
    while (found := read(Log(mirror.path("job"), LIMIT), offset, 1 << 20)).data:
        text, offset = text + found.data, found.end
    return text


def test_a_copy_grows_with_its_log(node: Path, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "copies")
    mirror.prepare("job")
    copy(node, mirror)
    assert not mirror.path("job").exists()
    for text in ("ä" * 100, "\nmore\n", "x" * 1000):
        with (node / "log").open("a") as file:
            file.write(text)
        copy(node, mirror)
        assert mirror.path("job").read_bytes() == (node / "log").read_bytes()


def test_a_second_attempt_goes_on_where_the_first_ended(node: Path, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "copies")
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
    mirror = Mirror(tmp_path / "copies")
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
    mirror = Mirror(tmp_path / "copies")
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
    mirror = Mirror(tmp_path / "copies")
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
