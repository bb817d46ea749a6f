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

MAX_PIECE_BYTES = 64
LIMIT = 4096


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "node" / "job").mkdir(parents=True)
    return tmp_path / "node" / "job"


def copy(node: Path, copies: LogCopies, base: int = 0) -> None:
    """Copy the log to its end, as the engine does."""
    while True:
        offset = copies.size("job") - base
        found = read_piece(node / "log", offset, MAX_PIECE_BYTES, LIMIT)
        if found.end == offset:
            return
        copies.write("job", base, found)


@pytest.mark.parametrize("lost_bytes", [1, 5, 500])
def test_a_copy_whose_beginning_was_lost_continues_at_its_offset(
    node: Path, tmp_path: Path, lost_bytes: int
) -> None:
    copies = LogCopies(JobFolders(tmp_path / "operator"))
    copies.resume("job", lost_bytes)
    assert copies.size("job") == lost_bytes
    (node / "log").write_bytes(b"what came after\n" * 20)
    copy(node, copies, base=lost_bytes)
    text = shown_text(copies)
    assert text[lost_bytes:] == b"what came after\n" * 20
    assert text[lost_bytes - 1 : lost_bytes] == b"\n"
    copies.resume("job", lost_bytes)
    assert shown_text(copies) == text


def shown_text(copies: LogCopies) -> bytes:
    text, offset = b"", 0
    while (found := read(Log(copies.folders.log("job"), LIMIT), offset, 1 << 20)).data:
        text, offset = text + found.data, found.end
    return text


def test_a_copy_grows_with_its_log(node: Path, tmp_path: Path) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.begin("job", 1)
    copy(node, copies)
    assert not copies.folders.log("job").exists()
    for text in ("ä" * 100, "\nmore\n", "x" * 1000):
        with (node / "log").open("a") as file:
            file.write(text)
        copy(node, copies)
        assert copies.folders.log("job").read_bytes() == (node / "log").read_bytes()


def test_the_copy_of_a_second_attempt_continues_where_the_first_ended(
    node: Path, tmp_path: Path
) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.begin("job", 1)
    copies.folders.append_to_log("job", "first")
    base = copies.begin("job", 1)
    (node / "log").write_text("second\n")
    copy(node, copies, base)
    assert copies.folders.log("job").read_text() == "first\nsecond\n"


@pytest.mark.parametrize("gap", [None, (20, 30), (2, 30)])
def test_the_copy_of_an_attempt_has_no_rest_of_an_earlier_one(
    node: Path, tmp_path: Path, gap: tuple[int, int] | None
) -> None:
    first, second = (LogCopies(JobFolders(tmp_path / name)) for name in ("o1", "o2"))
    text = "of the first attempt, until it was lost\n"
    first.begin("job", 1)
    first.folders.append_to_log("job", text[:9])
    second.recover("job", 1, 0)  # takes over
    second.folders.append_to_log("job", text)
    if gap is not None:
        record = LogCut(start=gap[0], end=gap[1], limit=LIMIT).dumps()
        second.folders.cut("job").write_bytes(record)
    base = first.begin("job", 2)  # takes over again
    (node / "log").write_text("second attempt\n" * 20)
    for _ in range(2):  # a restart keeps what was copied
        second.recover("job", 2, base)
        copy(node, second, base)
        shown = second.folders.log("job").read_text()
        assert shown[base:] == "second attempt\n" * 20
        (node / "log").unlink(missing_ok=True)
    assert b"second attempt\n" * 20 in shown_text(second)


def cut(node: Path, start: int, end: int) -> None:
    """Cut the log, as a job's supervisor does over the limit."""
    (node / "log.cut").write_bytes(LogCut(start=start, end=end, limit=LIMIT).dumps())
    with (node / "log").open("r+b") as file:
        file.seek(start)
        file.write(b"\0" * (end - start))


@pytest.mark.parametrize("cut", [None, LogCut(start=2, end=4, limit=9).dumps()])
def test_a_piece_makes_the_folder_of_its_copy(tmp_path: Path, cut: bytes | None) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.write("job", 0, LogPiece(0, b"line\n", 5, cut))
    assert copies.folders.log("job").stat().st_size == 5


@pytest.mark.parametrize("copied", [0, 50, 4000, 9000])
def test_a_gap_of_a_log_is_a_gap_of_its_copy(node: Path, tmp_path: Path, copied: int) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.begin("job", 1)
    copies.folders.append_to_log("job", "before")
    base = copies.begin("job", 1)
    text = b"".join(b"%04d\n" % number for number in range(2000))
    (node / "log").write_bytes(text[:copied])
    copy(node, copies, base)
    (node / "log").write_bytes(text)
    cut(node, 100, 8000)
    copy(node, copies, base)
    with (node / "log").open("ab") as file:
        file.write(b"end\n")
    copy(node, copies, base)
    found = shown_text(copies)
    assert found.startswith(b"before\n" + text[:100] + b"[cortex: 7.7 KiB of the log are gone")
    assert found.endswith(text[8000:] + b"end\n")
    assert copies.size("job") == base + len(text) + 4


def test_the_gaps_of_two_attempts_become_one(node: Path, tmp_path: Path) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.begin("job", 1)
    text = b"".join(b"%04d\n" % number for number in range(2000))
    for base in (0, len(text)):
        (node / "log").write_bytes(text)
        cut(node, 100, 8000)
        copy(node, copies, base)
        (node / "log.cut").unlink()
    found = shown_text(copies)
    assert found.startswith(text[:100] + b"[cortex: ")
    assert found.endswith(b"are gone: limits.log is 4 KiB]\n" + text[8000:])
    assert b"\0" not in found


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
def test_a_forged_cut_record_is_ignored(node: Path, tmp_path: Path, record: bytes) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.begin("job", 1)
    (node / "log").write_text("text\n")
    (node / "log.cut").write_bytes(record)
    copy(node, copies)
    assert shown_text(copies) == b"text\n"


def test_a_link_in_place_of_a_log_is_not_followed(node: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (node / "log").symlink_to(secret)
    assert read_piece(node / "log", 0, MAX_PIECE_BYTES, LIMIT).data == b""
    (node / "log").unlink()
    os.mkfifo(node / "log")
    assert read_piece(node / "log", 0, MAX_PIECE_BYTES, LIMIT).data == b""


def test_no_more_than_the_limit_is_copied_of_a_huge_log(node: Path, tmp_path: Path) -> None:
    copies = LogCopies(JobFolders(tmp_path / "copies"))
    copies.begin("job", 1)
    (node / "log").write_text("first\n")
    os.truncate(node / "log", 1 << 43)
    copy(node, copies)
    found = shown_text(copies)
    assert found.startswith(b"first\n")
    assert b"are gone: limits.log is 4 KiB]" in found
    assert len(found) < 1 << 18
    assert copies.folders.log("job").stat().st_blocks * 512 < 1 << 18


def odd_pieces() -> list[object]:
    piece = LogPiece(0, b"abc", 3, None)
    odd: list[dict[str, Any]] = [
        {"data": "abc"}, {"offset": -1}, {"end": 2},
        {"end": 1 << 62}, {"offset": 1.0}, {"offset": True},
    ]  # fmt: skip
    return [None, *(replace(piece, **each) for each in odd)]


@pytest.mark.parametrize("number", range(len(odd_pieces())))
def test_an_invalid_piece_is_refused(number: int) -> None:
    with pytest.raises(Invalid):
        checked_log_piece(odd_pieces()[number])
    sound = LogPiece(3, b"abc", 9, None)
    assert checked_log_piece(sound) is sound


def test_a_lock_file_with_an_invalid_name_or_text_is_refused() -> None:
    lock = Lock("ab12", "linux-x86_64-3.11.lock", "a==1\n")
    assert checked_lock_file(lock) == lock
    odd = [
        {"project_id": "../x"}, {"project_id": "a/b"}, {"project_id": 1}, {"name": "../x.lock"},
        {"name": "x"}, {"name": ".lock"}, {"name": "a/b.lock"}, {"name": None}, {"text": 1},
        {"text": "x" * (1 << 23)},
    ]  # fmt: skip
    for changed in odd:
        with pytest.raises(Invalid):
            checked_lock_file(replace(lock, **changed))  # type: ignore[arg-type]  # invalid on purpose
    assert checked_lock_file(replace(lock, text="\ud800")).text == "\\ud800"
