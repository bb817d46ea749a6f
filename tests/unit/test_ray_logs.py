"""A job's log, read on its node in pieces and copied to the operator."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cortex.engines.ray.log_copies import LogCopies, read_piece
from cortex.engines.ray.messages import Lock, LogPiece
from cortex.engines.ray.validation import checked_lock_file, checked_log_piece
from cortex.joblog.folders import JobFolders
from cortex.joblog.reader import Log, read
from cortex.worker.checks import Invalid
from cortex.worker.messages import LogCut

MOST = 64
LIMIT = 4096


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "node" / "job").mkdir(parents=True)
    return tmp_path / "node" / "job"


def copy(node: Path, copies: LogCopies, base: int = 0) -> None:
    """As the engine does, until there is no more."""
    while True:
        offset = copies.size("job") - base
        found = read_piece(node / "log", offset, MOST, LIMIT)
        if found.end == offset:
            return
        copies.write("job", base, found)


@pytest.mark.parametrize("lost", [1, 5, 500])
def test_a_copy_whose_beginning_was_lost_goes_on_at_its_place(
    node: Path, tmp_path: Path, lost: int
) -> None:
    copies = LogCopies(JobFolders(tmp_path / "operator"))
    copies.resume("job", lost)
    assert copies.size("job") == lost
    (node / "log").write_bytes(b"what came after\n" * 20)
    copy(node, copies, base=lost)
    text = shown(copies)
    assert text[lost:] == b"what came after\n" * 20
    assert text[lost - 1 : lost] == b"\n"
    copies.resume("job", lost)
    assert shown(copies) == text


def shown(copies: LogCopies) -> bytes:
    text, offset = b"", 0
    while (found := read(Log(copies.folders.log("job"), LIMIT), offset, 1 << 20)).data:
        text, offset = text + found.data, found.end
    return text


def test_a_copy_grows_with_its_log(node: Path, tmp_path: Path) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.create_folder("job")
    copy(node, copies)
    assert not copies.folders.log("job").exists()
    for text in ("ä" * 100, "\nmore\n", "x" * 1000):
        with (node / "log").open("a") as file:
            file.write(text)
        copy(node, copies)
        assert copies.folders.log("job").read_bytes() == (node / "log").read_bytes()


def test_a_second_attempt_goes_on_where_the_first_ended(node: Path, tmp_path: Path) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.create_folder("job")
    copies.folders.append_to_log("job", "first")
    base = copies.create_folder("job")
    (node / "log").write_text("second\n")
    copy(node, copies, base)
    assert copies.folders.log("job").read_text() == "first\nsecond\n"


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
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.create_folder("job")
    copies.folders.append_to_log("job", "before")
    base = copies.create_folder("job")
    text = b"".join(b"%04d\n" % number for number in range(2000))
    (node / "log").write_bytes(text[:copied])
    copy(node, copies, base)
    (node / "log").write_bytes(text)
    cut(node, 100, 8000)
    copy(node, copies, base)
    with (node / "log").open("ab") as file:
        file.write(b"end\n")
    copy(node, copies, base)
    told = shown(copies)
    assert told.startswith(b"before\n" + text[:100] + b"[cortex: 7.7 KiB of the log are gone")
    assert told.endswith(text[8000:] + b"end\n")
    assert copies.size("job") == base + len(text) + 4


def test_the_gaps_of_two_attempts_are_one(node: Path, tmp_path: Path) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.create_folder("job")
    text = b"".join(b"%04d\n" % number for number in range(2000))
    for base in (0, len(text)):
        (node / "log").write_bytes(text)
        cut(node, 100, 8000)
        copy(node, copies, base)
        (node / "log.cut").unlink()
    told = shown(copies)
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
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.create_folder("job")
    (node / "log").write_text("text\n")
    (node / "log.cut").write_bytes(record)
    copy(node, copies)
    assert shown(copies) == b"text\n"


def test_a_link_in_the_place_of_a_log_is_not_followed(node: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (node / "log").symlink_to(secret)
    assert read_piece(node / "log", 0, MOST, LIMIT).data == b""
    (node / "log").unlink()
    os.mkfifo(node / "log")
    assert read_piece(node / "log", 0, MOST, LIMIT).data == b""


def test_of_a_log_as_large_as_a_file_can_be_no_more_is_copied_than_its_limit_allows(
    node: Path, tmp_path: Path
) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.create_folder("job")
    (node / "log").write_text("first\n")
    os.truncate(node / "log", 1 << 43)
    copy(node, copies)
    told = shown(copies)
    assert told.startswith(b"first\n")
    assert b"are gone: limits.log is 4 KiB]" in told
    assert len(told) < 1 << 18
    assert copies.folders.log("job").stat().st_blocks * 512 < 1 << 18


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
        checked_log_piece(odd_pieces()[number])
    sound = LogPiece(3, b"abc", 9, None)
    assert checked_log_piece(sound) is sound


def test_a_lock_file_gets_a_name_of_its_own_alone() -> None:
    lock = Lock("ab12", "linux-x86_64-3.11.lock", "a==1\n")
    assert checked_lock_file(lock) == lock
    odd = [
        {"project_id": "../x"}, {"project_id": "a/b"}, {"project_id": 1}, {"name": "../x.lock"},
        {"name": "x"}, {"name": ".lock"}, {"name": "a/b.lock"}, {"name": None}, {"text": 1},
        {"text": "x" * (1 << 23)},
    ]  # fmt: skip
    for changed in odd:
        with pytest.raises(Invalid):
            checked_lock_file(replace(lock, **changed))  # type: ignore[arg-type]  # that is what is tried
    assert checked_lock_file(replace(lock, text="\ud800")).text == "\\ud800"
