"""Logs in an object store that several operators share, each with its own data folder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from cortex.errors import NoLeader, NotFound, StorageUnavailable
from cortex.joblog.folders import JobFolders
from cortex.objects import ObjectStore
from cortex.operator.logs.archive import Archive
from cortex.operator.logs.archived_files import ArchivedFiles
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import State, Wanted
from cortex.store import Store
from cortex.worker.messages import LogCut
from cortex.worker.supervisor import logfile
from store.recorded_leader import eventually

_SPEC = JobSpec(job_id="1", api_name="a", api_id="1", config="{}", created_ns=1)
FINISHED = JobRecord(1, _SPEC, State.SUCCEEDED, Wanted.RUN, attempt=1, handle=None)

LIMIT = 1 << 20


class Follower:
    """An operator that is not the leader."""

    def __init__(self, folder: Path) -> None:
        for name in ("files", "jobs", "archived"):
            (folder / name).mkdir()
        self.log = folder / "jobs" / FINISHED.spec.job_id / "log"
        self.files = ObjectStore(f"file://{folder / 'files'}")
        self.store = Store(f"sqlite:///{folder / 'operator.db'}")
        self.folders = JobFolders(folder / "jobs")
        self.marks = folder / "archived"
        self.archive = Archive(self.files, self.folders, self.store, self.marks, is_apart=True)

    def bring_back(self) -> None:
        asyncio.run(self.archive.bring_back(FINISHED))


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Follower]:
    made = Follower(tmp_path)
    yield made
    made.archive.end()
    made.store.close()


def test_a_log_that_is_not_archived_yet_can_only_come_from_the_leader(follower: Follower) -> None:
    with pytest.raises(NoLeader, match="not in the object store yet"):
        follower.bring_back()
    follower.files.put("logs/1/log", b"all of it")
    follower.bring_back()
    assert follower.log.read_bytes() == b"all of it"


def test_a_partial_log_of_an_earlier_term_is_not_taken_for_the_whole_log(
    follower: Follower,
) -> None:
    follower.log.parent.mkdir()
    follower.log.write_bytes(b"all")
    with pytest.raises(NoLeader):
        follower.bring_back()
    follower.files.put("logs/1/log", b"all of it")
    follower.bring_back()
    assert follower.log.read_bytes() == b"all of it"
    assert asyncio.run(follower.archive.has("1"))


def test_a_partial_copy_that_another_operator_removes_meanwhile_is_no_error(
    follower: Follower,
) -> None:
    (follower.marks / ".part-1").symlink_to("missing")
    follower.log.parent.mkdir()
    copies = ArchivedFiles(follower.files, follower.folders, follower.marks)
    assert copies.not_sent() == ["1"]


def test_a_log_that_is_removed_while_it_is_fetched_leaves_no_mark(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower.files.put("logs/1/log", b"all of it")
    get, is_fetched, may_return = follower.files.get, threading.Event(), threading.Event()

    def get_slowly(key: str, target: Path) -> bool:
        found = get(key, target)
        is_fetched.set()
        assert may_return.wait(30)
        return found

    async def fetch_and_remove() -> None:
        fetch = asyncio.create_task(follower.archive.bring_back(FINISHED))
        await asyncio.to_thread(is_fetched.wait, 30)
        removal = asyncio.create_task(follower.archive.remove(["1"]))
        done, _ = await asyncio.wait([removal], timeout=0.3)
        assert not done
        may_return.set()
        await asyncio.gather(fetch, removal)

    monkeypatch.setattr(follower.files, "get", get_slowly)
    asyncio.run(fetch_and_remove())
    assert not follower.files.get("logs/1/log", follower.log.with_name("other"))
    assert not list(follower.marks.iterdir())


def test_a_failed_upload_of_a_cut_log_leaves_no_files(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = ArchivedFiles(follower.files, follower.folders, follower.marks)
    cut = LogCut(start=2, end=5, limit=4).dumps()
    follower.log.parent.mkdir()
    follower.log.write_bytes(b"ab\0\0\0cd")
    follower.log.with_name(logfile.CUT).write_bytes(cut)
    follower.files.put("logs/1/log", b"abcd")

    def fails(*_: object) -> NoReturn:
        raise StorageUnavailable("the object store does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(follower.files, "put", fails)
        with pytest.raises(StorageUnavailable):
            copies.send("1", LIMIT, 1, is_sure=True)
        broken.setattr(follower.files, "read", fails)
        with pytest.raises(StorageUnavailable):
            copies.send("1", LIMIT, 1, is_sure=False)
    assert not list(follower.marks.iterdir())
    copies.send("1", LIMIT, 1, is_sure=True)
    assert follower.files.read("logs/1/log") == b"abcd"
    follower.log.unlink()
    assert copies.bring_back("1", is_sure=True, is_leading=True)
    assert follower.log.read_bytes() == b"ab\0\0\0cd"
    assert [mark.name for mark in follower.marks.iterdir()] == ["1"]


def no_live_jobs() -> Any:
    """A dispatcher that has no unfinished job."""
    return SimpleNamespace(live_jobs=SimpleNamespace(find=lambda _: None))


def test_a_log_whose_job_has_just_finished_is_sent_without_a_read_of_the_job(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: str) -> NoReturn:
        raise StorageUnavailable("the store does not answer")

    async def work() -> None:
        await follower.archive.open(no_live_jobs())
        follower.log.parent.mkdir()
        follower.log.write_bytes(b"all of it")
        follower.archive.finished(FINISHED)
        await eventually((follower.marks / "1").exists)
        await follower.archive.close()

    monkeypatch.setattr(follower.store, "job", fails)
    asyncio.run(work())
    assert follower.files.read("logs/1/log") == b"all of it"


def test_a_job_that_is_removed_before_its_log_is_sent_again_is_not_archived(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another operator, which has become the leader: this one's job is not in the store."""
    put, failures = follower.files.put, 0
    is_read = asyncio.Event()
    job = follower.store.job

    def fails_once(name: str, content: bytes | Path) -> None:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise StorageUnavailable("the object store does not answer")
        put(name, content)

    async def read(job_id: str) -> JobRecord | None:
        found = await job(job_id)
        is_read.set()
        return found

    async def work() -> None:
        await follower.archive.open(no_live_jobs())
        follower.log.parent.mkdir()
        follower.log.write_bytes(b"all of it")
        follower.archive.finished(FINISHED)
        async with asyncio.timeout(30):
            await is_read.wait()
        await eventually(lambda: not list(follower.marks.iterdir()))
        await follower.archive.close()

    monkeypatch.setattr(follower.files, "put", fails_once)
    monkeypatch.setattr(follower.store, "job", read)
    asyncio.run(work())
    assert failures == 1
    assert follower.files.read("logs/1/log") is None


@pytest.mark.parametrize("is_killed", [True, False])
def test_an_operator_that_led_sends_its_logs_although_another_one_leads_now(
    follower: Follower, monkeypatch: pytest.MonkeyPatch, *, is_killed: bool
) -> None:
    put, is_away = follower.files.put, True
    tried = threading.Event()

    def try_to_put(name: str, content: bytes | Path) -> None:
        tried.set()
        if is_away:
            raise StorageUnavailable("the object store does not answer")
        put(name, content)

    async def job(_: str) -> JobRecord:
        return FINISHED

    async def work() -> None:
        nonlocal is_away
        first = follower.archive
        await first.start()
        await first.open(no_live_jobs())
        for name in ("1", "2"):  # the job 2 has not ended here
            follower.folders.folder(name).mkdir()
            follower.folders.append_to_log(name, "all of it")
        first.finished(FINISHED)
        await eventually(tried.is_set)
        assert await first.has("1")
        await first.close()
        later = first
        if is_killed:
            await first.stop()
            later = Archive(
                follower.files, follower.folders, follower.store, follower.marks, is_apart=True
            )
            await later.start()
        assert await later.has("1")
        assert not await later.has("2")
        await later.bring_back(FINISHED)
        is_away = False
        await eventually(lambda: [mark.name for mark in follower.marks.iterdir()] == ["1"])
        await later.stop()
        later.end()

    monkeypatch.setattr(follower.files, "put", try_to_put)
    monkeypatch.setattr(follower.store, "job", job)
    asyncio.run(work())
    assert follower.files.read("logs/1/log") == b"all of it\n"
    assert follower.files.read("logs/2/log") is None


def test_the_message_of_a_log_that_another_operator_owes_says_what_to_do(
    follower: Follower,
) -> None:
    async def work() -> None:
        await follower.archive.open(no_live_jobs())
        try:
            with pytest.raises(NotFound, match="start it again: it sends the log then"):
                await follower.archive.bring_back(FINISHED)
        finally:
            await follower.archive.close()

    asyncio.run(work())


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
def test_a_forged_cut_record_uploaded_by_an_earlier_version_is_ignored(
    follower: Follower, cut: bytes
) -> None:
    follower.files.put("logs/1/log", b"abcd")
    follower.files.put("logs/1/log.cut", cut)
    follower.bring_back()
    assert follower.log.read_bytes() == b"abcd"
    assert not follower.log.with_name(logfile.CUT).exists()
