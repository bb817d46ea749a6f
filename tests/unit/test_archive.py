"""Logs in the store of files, where operators on one store have data folders of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from cortex.errors import NoLeader, StorageUnavailable
from cortex.joblog.folders import JobFolders
from cortex.objects import ObjectStore
from cortex.operator.logs.archive import Archive
from cortex.operator.logs.archived_files import ArchivedFiles
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import State, Wanted
from cortex.store import Store
from cortex.worker.messages import LogCut
from cortex.worker.supervisor import logfile

_SPEC = JobSpec(job_id="1", api_name="a", api_id="1", config="{}", created_ns=1)
OVER = JobRecord(1, _SPEC, State.SUCCEEDED, Wanted.RUN, attempt=1, handle=None)

LIMIT = 1 << 20


class BodyReader:
    """An operator that does not drive."""

    def __init__(self, folder: Path) -> None:
        for name in ("files", "jobs", "archived"):
            (folder / name).mkdir()
        self.log = folder / "jobs" / OVER.spec.job_id / "log"
        self.files = ObjectStore(f"file://{folder / 'files'}")
        self.store = Store(f"sqlite:///{folder / 'operator.db'}")
        self.folders = JobFolders(folder / "jobs")
        self.marks = folder / "archived"
        self.archive = Archive(self.files, self.folders, self.store, self.marks, is_apart=True)

    def bring_back(self) -> None:
        asyncio.run(self.archive.bring_back(OVER))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[BodyReader]:
    made = BodyReader(tmp_path)
    yield made
    made.archive.end()
    made.store.close()


def test_what_is_not_there_yet_may_be_with_whoever_drives(reader: BodyReader) -> None:
    with pytest.raises(NoLeader, match="not in the object store yet"):
        reader.bring_back()
    reader.files.put("logs/1/log", b"all of it")
    reader.bring_back()
    assert reader.log.read_bytes() == b"all of it"


def test_what_is_here_of_an_earlier_term_is_not_taken_for_all_of_it(reader: BodyReader) -> None:
    reader.log.parent.mkdir()
    reader.log.write_bytes(b"all")
    with pytest.raises(NoLeader):
        reader.bring_back()
    reader.files.put("logs/1/log", b"all of it")
    reader.bring_back()
    assert reader.log.read_bytes() == b"all of it"
    assert asyncio.run(reader.archive.has("1"))


def test_a_part_that_another_operator_removes_meanwhile_is_no_hindrance(reader: BodyReader) -> None:
    (reader.marks / ".part-1").symlink_to("gone")
    reader.log.parent.mkdir()
    copies = ArchivedFiles(reader.files, reader.folders, reader.marks)
    assert copies.not_sent() == ["1"]


def test_a_log_that_is_removed_while_it_is_read_leaves_no_mark(
    reader: BodyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.files.put("logs/1/log", b"all of it")
    get, is_there, may_go_on = reader.files.get, threading.Event(), threading.Event()

    def get_slowly(key: str, target: Path) -> bool:
        found = get(key, target)
        is_there.set()
        assert may_go_on.wait(30)
        return found

    async def both() -> None:
        read = asyncio.create_task(reader.archive.bring_back(OVER))
        await asyncio.to_thread(is_there.wait, 30)
        removal = asyncio.create_task(reader.archive.remove(["1"]))
        done, _ = await asyncio.wait([removal], timeout=0.3)
        assert not done
        may_go_on.set()
        await asyncio.gather(read, removal)

    monkeypatch.setattr(reader.files, "get", get_slowly)
    asyncio.run(both())
    assert not reader.files.get("logs/1/log", reader.log.with_name("other"))
    assert not list(reader.marks.iterdir())


def test_a_cut_log_that_cannot_be_sent_or_fetched_leaves_nothing_of_each_try(
    reader: BodyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = ArchivedFiles(reader.files, reader.folders, reader.marks)
    cut = LogCut(start=2, end=5, limit=4).dumps()
    reader.log.parent.mkdir()
    reader.log.write_bytes(b"ab\0\0\0cd")
    reader.log.with_name(logfile.CUT).write_bytes(cut)
    reader.files.put("logs/1/log", b"abcd")

    def fails(*_: object) -> NoReturn:
        raise StorageUnavailable("the store of files does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(reader.files, "put", fails)
        with pytest.raises(StorageUnavailable):
            copies.send("1", LIMIT, 1, is_sure=True)
        broken.setattr(reader.files, "read", fails)
        with pytest.raises(StorageUnavailable):
            copies.send("1", LIMIT, 1, is_sure=False)
    assert not list(reader.marks.iterdir())
    copies.send("1", LIMIT, 1, is_sure=True)
    assert reader.files.read("logs/1/log") == b"abcd"
    reader.log.unlink()
    assert copies.bring_back("1", is_sure=True, is_leading=True)
    assert reader.log.read_bytes() == b"ab\0\0\0cd"
    assert [mark.name for mark in reader.marks.iterdir()] == ["1"]


@pytest.mark.parametrize(
    "cut",
    [
        b"",
        b"{}",
        b'{"start": "a", "end": 9, "limit": 1}',
        b'{"start": 2, "end": %d, "limit": 1}' % (1 << 62),
        b'{"start": 2, "end": %d, "limit": 1}' % (1 << 59),
        b'{"start": 99, "end": 100, "limit": 1}',
    ],
)
def test_what_an_earlier_version_has_sent_of_a_forged_cut_is_no_error(
    reader: BodyReader, cut: bytes
) -> None:
    reader.files.put("logs/1/log", b"abcd")
    reader.files.put("logs/1/log.cut", cut)
    reader.bring_back()
    assert reader.log.read_bytes() == b"abcd"
    assert not reader.log.with_name(logfile.CUT).exists()
