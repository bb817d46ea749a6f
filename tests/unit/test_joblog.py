"""A job's folder and log, also where the middle of the log is cut out, or the log was replaced or
removed; and the reports of changes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cortex.joblog.folders import JobFolders
from cortex.joblog.reader import (
    Log,
    Piece,
    is_replaced,
    length,
    log_exists,
    open_log,
    opened,
    read,
)
from cortex.joblog.watch import FileWatch
from cortex.worker.messages import LogCut

LIMIT = 1 << 20
GAP = LogCut(start=4, end=8, limit=LIMIT)


@pytest.fixture
def folders(tmp_path: Path) -> JobFolders:
    made = JobFolders(tmp_path / "jobs")
    made.folder("job").mkdir(parents=True)
    return made


@pytest.fixture
def log(folders: JobFolders) -> Log:
    """A log whose middle is cut out."""
    path = folders.log("job")
    path.write_bytes(b"abc\n\0\0\0\0def\n")
    folders.cut("job").write_bytes(GAP.dumps())
    return Log(path, LIMIT)


def whole(log: Log, size: int) -> bytes:
    text, offset = b"", 0
    while (piece := read(log, offset, size)).data:
        text, offset = text + piece.data, piece.end
    assert offset == length(log.path)
    return text


def test_all_of_a_job_lies_in_one_folder(folders: JobFolders, tmp_path: Path) -> None:
    job = tmp_path / "jobs" / "job"
    assert folders.folder("job") == Path(folders.folder_name("job")) == job
    assert folders.log("job") == job / "log"
    assert folders.cut("job") == job / "log.cut"
    assert folders.files("job") == job / "files"
    assert folders.start_record("job", 2) == job / "start.2"
    assert folders.exit_record("job", 2) == job / "exit.2"


def test_a_relative_root_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = JobFolders(Path("jobs"))
    monkeypatch.chdir("/")
    assert folders.log("job") == tmp_path / "jobs" / "job" / "log"


def test_the_jobs_with_a_folder_are_listed_and_engines_own_folders_are_not(
    folders: JobFolders,
) -> None:
    for name in ("b", "a", ".own", ".import"):
        (folders.root / name).mkdir()
    assert folders.job_ids() == ["a", "b", "job"]
    with pytest.raises(FileNotFoundError):
        JobFolders(folders.root / "none").job_ids()


def test_a_line_is_appended_to_the_log_of_a_job_that_never_got_a_worker(
    folders: JobFolders,
) -> None:
    folders.append_to_log("new", "the environment is broken\n")
    folders.append_to_log("new", "twice")
    assert folders.log("new").read_text() == "the environment is broken\ntwice\n"
    assert folders.folder("new").stat().st_mode & 0o777 == 0o700
    folders.remove("new")
    folders.remove("new")
    assert not folders.folder("new").exists()


def test_nothing_is_appended_where_the_jobs_root_was_moved_away(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        JobFolders(tmp_path / "moved").append_to_log("job", "text")
    assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize("size", [1, 3, 4, 5, 100])
def test_a_line_stands_for_the_cut_out_middle_of_a_log(log: Log, size: int) -> None:
    marker = b"[cortex: 4 B of the log are gone: limits.log is 1 MiB]\n"
    assert whole(log, size) == b"abc\n" + marker + b"def\n"


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (2, Piece(b"c\n", 4)),
        (8, Piece(b"def\n", 12)),
        (11, Piece(b"\n", 12)),
        (12, Piece(b"", 12)),
        (99, Piece(b"", 99)),
    ],
)
def test_a_log_is_read_from_an_offset_up_to_its_gap_or_after_it(
    log: Log, offset: int, expected: Piece
) -> None:
    assert read(log, offset, 100) == expected


@pytest.mark.parametrize("offset", [4, 5, 7])
def test_an_offset_in_the_gap_leads_to_its_end(log: Log, offset: int) -> None:
    piece = read(log, offset, 100)
    assert piece.is_marker
    assert piece.end == GAP.end
    with opened(log.path) as file:
        assert file is not None
        part = file.part(offset, 100, LIMIT)
    assert part.data == b""
    assert part.is_in_gap
    assert part.end == offset


def test_a_cut_made_during_a_read_does_not_read_as_zeros(
    folders: JobFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(folders.log("job"), LIMIT)
    log.path.write_bytes(b"abc\n....def\n")
    pread = os.pread

    def cut_before(fd: int, size: int, offset: int) -> bytes:
        monkeypatch.setattr(os, "pread", pread)
        folders.cut("job").write_bytes(GAP.dumps())
        with log.path.open("r+b") as file:
            file.seek(GAP.start)
            file.write(b"\0" * (GAP.end - GAP.start))
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", cut_before)
    assert read(log, 0, 100) == Piece(b"abc\n", 4)


def test_each_attempt_may_have_filled_the_log(folders: JobFolders) -> None:
    path = folders.log("job")
    path.touch()
    os.truncate(path, 2 * LIMIT)
    with opened(path) as file:
        assert file is not None
        assert file.gap(LIMIT, attempts=2) is None
        gap = file.gap(LIMIT)
    assert gap is not None
    assert gap.limit == LIMIT


def test_where_no_log_exists_nothing_is_read(folders: JobFolders) -> None:
    for path in (folders.log("job"), folders.log("other")):
        assert open_log(path) is None
        assert read(Log(path, LIMIT), 0, 10) == Piece(b"", 0)
        assert not log_exists(path)
        assert not is_replaced(path)
        assert length(path) == 0


@pytest.mark.parametrize("name", ["log", "log.cut"])
def test_a_link_in_place_of_a_log_or_of_its_cut_record_is_not_read(
    log: Log, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(LogCut(start=0, end=12, limit=1).dumps())
    path = log.path.with_name(name)
    for make in (path.symlink_to, path.hardlink_to):
        path.unlink()
        make(secret)
        if name == "log":
            assert read(log, 0, 100).data == b""
            assert is_replaced(log.path)
        else:
            assert read(log, 0, 100).data == b"abc\n\0\0\0\0def\n"


def test_an_open_log_is_read_on_when_it_is_removed(log: Log) -> None:
    with opened(log.path) as file:
        assert file is not None
        log.path.unlink()
        assert file.part(0, 4, LIMIT).data == b"abc\n"
    assert not log_exists(log.path)
    assert read(log, 4, 100) == Piece(b"", 4)


def test_an_open_log_keeps_its_gap_when_its_folder_is_moved(log: Log, folders: JobFolders) -> None:
    with opened(log.path) as file:
        assert file is not None
        folders.folder("job").rename(folders.folder("moved"))
        gap = file.gap(LIMIT)
    assert gap is not None
    assert gap.fields() == GAP.fields()


@asynccontextmanager
async def watching() -> AsyncIterator[FileWatch]:
    watch = FileWatch("test")
    try:
        yield watch
    finally:
        await watch.close()


async def reported(changed: asyncio.Event) -> None:
    async with asyncio.timeout(30):
        await changed.wait()
    changed.clear()


async def is_silent(changed: asyncio.Event) -> bool:
    await asyncio.sleep(0.1)
    return not changed.is_set()


def by_rename(made: Path, record: Path) -> None:
    made.rename(record)


def by_link(made: Path, record: Path) -> None:
    record.hardlink_to(made)


def by_creation(made: Path, record: Path) -> None:
    record.write_bytes(made.read_bytes())


@pytest.mark.parametrize("give_name", [by_rename, by_link, by_creation])
def test_an_exit_record_is_reported_however_it_got_its_name(
    folders: JobFolders, give_name: Callable[[Path, Path], None]
) -> None:
    made = folders.root / "made"
    made.write_text("{}")

    async def main() -> None:
        appeared, other = asyncio.Event(), asyncio.Event()
        async with watching() as watch:
            watch.watch_appearance(folders.exit_record("job", 1), appeared.set)
            watch.watch_appearance(folders.exit_record("job", 2), other.set)
            (folders.folder("job") / "anything").touch()
            assert await is_silent(appeared)
            give_name(made, folders.exit_record("job", 1))
            await reported(appeared)
            assert await is_silent(other)

    asyncio.run(main())


def test_a_log_is_reported_when_it_is_created_and_when_it_grows(folders: JobFolders) -> None:
    async def main() -> None:
        grown, appeared = asyncio.Event(), asyncio.Event()
        path, record = folders.log("job"), folders.exit_record("job", 1)
        async with watching() as watch:
            watch.watch_growth(path, grown.set)
            watch.watch_appearance(record, appeared.set)
            path.touch()
            await reported(grown)
            with path.open("a") as file:
                file.write("more")
            await reported(grown)
            assert await is_silent(appeared)
            watch.remove(path, grown.set)
            path.write_text("and more")
            record.touch()  # its folder is still watched
            await reported(appeared)
            assert not grown.is_set()

    asyncio.run(main())


def test_an_open_log_is_watched_and_its_replacement_is_not(folders: JobFolders) -> None:
    async def main() -> None:
        path, first, second = folders.log("job"), asyncio.Event(), asyncio.Event()
        async with watching() as watch:
            assert not watch.watch_open_log(path, first.set)
            path.touch()
            assert watch.watch_open_log(path, first.set)
            with path.open("a") as file:
                path.rename(path.with_name("moved"))
                path.write_text("in its place")
                assert await is_silent(first)
                print("more", file=file, flush=True)
                await reported(first)
            assert watch.watch_open_log(path, second.set)
            path.write_text("more")
            await reported(second)
            await reported(first)
            watch.remove(path, first.set)
            watch.remove(path, first.set)
            path.write_text("and more")
            await reported(second)
            assert not first.is_set()
            watch.remove(path, second.set)
            path.write_text("unseen")
            assert await is_silent(second)

    asyncio.run(main())


def test_a_deleted_file_can_be_removed_from_the_watch(
    folders: JobFolders,
) -> None:
    async def main() -> None:
        changed = asyncio.Event()
        watch = FileWatch("test")
        path, record = folders.log("job"), folders.exit_record("job", 1)
        path.touch()
        assert watch.watch_open_log(path, changed.set)
        watch.watch_appearance(record, changed.set)
        folders.remove("job")
        await asyncio.sleep(0.1)
        watch.remove(path, changed.set)
        await watch.close()
        watch.remove(record, changed.set)
        with pytest.raises(FileNotFoundError):
            watch.watch_growth(path, changed.set)
        await watch.close()

    asyncio.run(main())
