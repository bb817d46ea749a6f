"""PostgreSQL only: which data folder may use which database and which object store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cortex.errors import StartupError, StorageUnavailable
from cortex.objects import ObjectStore
from cortex.operator.config.settings import Ray, Settings
from cortex.operator.data_folder import give_up_lost_jobs, join_group
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import Event
from cortex.store import Store
from cortex.worker import processes
from store.recorded_leader import eventually, sessions
from store.store_harness import EVENTS, draft, spec


class Installation:
    """A database, an object store, and a data folder for each name."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder = folder
        self.database = database
        self.has_object_store = True
        (folder / "files").mkdir()
        self.files = ObjectStore(f"file://{folder}/files")
        """The object store of the last start."""

    def start(self, name: str, **more: object) -> str:
        """Start and stop an operator on the data folder of this name; the folder's id."""
        settings = Settings(self.folder / name, **more)  # type: ignore[arg-type]  # its own fields
        settings.data_dir.mkdir(exist_ok=True)
        store = Store(self.database)
        try:
            self.files = ObjectStore(self.files.url)
            files = self.files if self.has_object_store else None
            return asyncio.run(join(settings, store, files))
        finally:
            store.close()

    def await_end_of_sessions(self) -> None:
        """Wait until the server has ended the sessions: a start waits only three seconds for it."""
        asyncio.run(eventually(lambda: not sessions(self.database)))


@pytest.fixture
def installation(tmp_path: Path, empty_database: str) -> Installation:
    return Installation(tmp_path, empty_database)


async def join(settings: Settings, store: Store, files: ObjectStore | None) -> str:
    """Join the group as an operator does at its start; the id of its data folder."""
    data_folder_id = await join_group(settings, store, files)
    await give_up_lost_jobs(settings, store)
    return data_folder_id


@contextmanager
def connected_operator(database: str, data_folder_id: str) -> Iterator[None]:
    """Another operator, which stays connected."""
    store = Store(database)
    store.operators.join(data_folder_id, processes.boot_id(), "http://operator.invalid")
    try:
        yield
    finally:
        store.close()


RAY = Ray("127.0.0.1:1")


def test_on_ray_a_new_folder_joins_the_database_and_the_object_store(
    installation: Installation,
) -> None:
    first = installation.start("one", ray=RAY)
    assert installation.start("one", ray=RAY) == first
    assert installation.start("two", ray=RAY) == first
    assert installation.start("one", ray=RAY) == first


def test_new_folders_that_join_at_the_same_time_have_one_id(installation: Installation) -> None:
    with ThreadPoolExecutor(4) as pool:
        names = ["one", "two", "three", "four"]
        ids = set(pool.map(lambda name: installation.start(name, ray=RAY), names))
    assert len(ids) == 1


def test_with_the_local_engine_a_new_folder_is_refused(installation: Installation) -> None:
    first = installation.start("one")
    with pytest.raises(StartupError, match=f"--lost-folder {first}"):
        installation.start("two")
    installation.await_end_of_sessions()
    second = installation.start("two", lost_folder=first)
    assert second != first
    assert installation.start("two", lost_folder=first) == second
    with pytest.raises(StartupError, match=f"--lost-folder {second}"):
        installation.start("one")


def test_the_object_store_of_another_database_is_refused(
    installation: Installation, tmp_path: Path
) -> None:
    first = installation.start("one", ray=RAY)
    installation.database = f"sqlite:///{tmp_path / 'other.db'}"
    for ray in (RAY, None):
        with pytest.raises(StartupError, match=f"another data folder, {first}"):
            installation.start("two", ray=ray)
    second = installation.start("two", lost_folder=first)
    assert second != first
    assert installation.start("two") == second


def test_a_folder_starts_without_an_object_store_that_it_has_used(
    installation: Installation, tmp_path: Path
) -> None:
    first = installation.start("one", ray=RAY)
    store, away = tmp_path / "files", tmp_path / "away"
    store.rename(away)
    assert installation.start("one", ray=RAY) == first
    with pytest.raises(StorageUnavailable, match="files"):
        installation.files.check()
    away.rename(store)
    installation.files.check()
    store.rename(away)
    # Only the object store says that a new folder continues the first.
    with pytest.raises(StartupError, match="cannot be used"):
        installation.start("two", ray=RAY)


def test_an_object_store_that_belongs_to_another_folder_by_now_is_not_used(
    installation: Installation, tmp_path: Path
) -> None:
    first = installation.start("one")
    ObjectStore(installation.files.url).set_owner("another")
    installation.start("one")
    for use in (installation.files.check, lambda: installation.files.put("x", b"")):
        with pytest.raises(StorageUnavailable, match="another data folder now, another"):
            use()
    assert installation.files._read_owner() == "another"
    assert not (tmp_path / "files" / "x").exists()
    # An administrator declares that folder lost.
    installation.start("one", lost_folder="another")
    installation.files.put("x", b"")
    assert ObjectStore(installation.files.url).owner() == first


def test_a_takeover_that_a_crash_interrupted_is_finished(installation: Installation) -> None:
    first = installation.start("one")
    marker = installation.folder / "two" / "taken-over"
    installation.await_end_of_sessions()
    second = installation.start("two", lost_folder=first)
    marker.write_text(first)  # as if a crash had come before its removal
    assert installation.start("two") == second
    assert not marker.exists()


def test_no_job_is_given_up_for_a_folder_that_is_not_lost(
    installation: Installation, tmp_path: Path
) -> None:
    installation.has_object_store = False
    other_database, own_database = installation.database, f"sqlite:///{tmp_path / 'own.db'}"
    first = installation.start("one")
    installation.database = own_database
    installation.start("two")
    store = Store(own_database)

    async def claimed_job() -> JobRecord:
        await store.deploy([spec()])
        record, _ = await store.submit(draft())
        return (await store.apply(record.spec.job_id, EVENTS[Event.CLAIM])).job or record

    claimed = asyncio.run(claimed_job())
    installation.database = other_database
    with (
        connected_operator(other_database, first),
        pytest.raises(StartupError, match=f"{first} is not lost"),
    ):
        installation.start("two", lost_folder=first)
    installation.database = own_database
    installation.start("two")
    assert asyncio.run(store.job(claimed.spec.job_id)) == claimed
    store.close()
    installation.database = other_database
    installation.await_end_of_sessions()
    installation.start("two", lost_folder=first)  # now the folder is lost


def test_an_unreadable_folder_id_is_reported(installation: Installation) -> None:
    installation.start("one")
    (installation.folder / "one" / "folder.id").write_bytes(b"\xff")
    with pytest.raises(StartupError, match=r"folder\.id cannot be read"):
        installation.start("one")
    (installation.folder / "three").mkdir()
    (installation.folder / "three" / "folder.id").mkdir()
    with pytest.raises(StartupError, match=r"folder\.id cannot be read"):
        installation.start("three")
