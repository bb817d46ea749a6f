"""Which data folder may drive which database with which store of files."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cortex.errors import StartupError
from cortex.objects import ObjectStore
from cortex.operator.config.settings import Ray, Settings
from cortex.operator.data_folder import give_up_lost_jobs, join_group
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import Event
from cortex.store import Store
from cortex.worker import processes
from store.recorded_leader import eventually, sessions
from store.test_jobs import EVENTS, draft, spec


async def started(settings: Settings, store: Store, files: ObjectStore | None) -> str:
    place = await join_group(settings, store, files)
    await give_up_lost_jobs(settings, store)
    return place


class Home:
    """A database, a store of files, and as many data folders as there are names."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder = folder
        self.database = database
        self.has_files = True
        (folder / "files").mkdir()

    def start(self, name: str, **more: object) -> str:
        settings = Settings(self.folder / name, **more)  # type: ignore[arg-type]  # its own fields
        settings.data_dir.mkdir(exist_ok=True)
        store = Store(self.database)
        try:
            files = ObjectStore(f"file://{self.folder}/files") if self.has_files else None
            return asyncio.run(started(settings, store, files))
        finally:
            store.close()

    def is_left(self) -> None:
        """Wait until the database knows that no operator is there: a start waits three seconds for that."""
        asyncio.run(eventually(lambda: not sessions(self.database)))


@pytest.fixture
def home(tmp_path: Path, empty_database: str) -> Home:
    return Home(tmp_path, empty_database)


@contextmanager
def operator_on(database: str, place: str) -> Iterator[None]:
    """An operator that is there."""
    store = Store(database)
    store.operators.join(place, processes.boot_id(), "http://operator.invalid")
    try:
        yield
    finally:
        store.close()


RAY = Ray("127.0.0.1:1")


def test_a_new_folder_takes_over_what_is_all_elsewhere(home: Home) -> None:
    first = home.start("one", ray=RAY)
    assert home.start("one", ray=RAY) == first
    assert home.start("two", ray=RAY) == first
    assert home.start("one", ray=RAY) == first


def test_folders_that_come_at_the_same_time_are_one(home: Home) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(lambda name: home.start(name, ray=RAY), ["one", "two", "three", "four"]))
    assert len(ids) == 1


def test_where_jobs_run_on_the_machine_a_new_folder_is_refused(home: Home) -> None:
    first = home.start("one")
    with pytest.raises(StartupError, match=f"--lost-folder {first}"):
        home.start("two")
    home.is_left()
    second = home.start("two", lost_folder=first)
    assert second != first
    assert home.start("two", lost_folder=first) == second
    with pytest.raises(StartupError, match=f"--lost-folder {second}"):
        home.start("one")


def test_files_of_another_database_are_not_taken(home: Home, tmp_path: Path) -> None:
    first = home.start("one", ray=RAY)
    home.database = f"sqlite:///{tmp_path / 'other.db'}"
    for ray in (RAY, None):
        with pytest.raises(StartupError, match=f"another data folder, {first}"):
            home.start("two", ray=ray)
    second = home.start("two", lost_folder=first)
    assert second != first
    assert home.start("two") == second


def test_what_was_begun_before_a_crash_is_finished(home: Home) -> None:
    first = home.start("one")
    marker = home.folder / "two" / "taken-over"
    home.is_left()
    second = home.start("two", lost_folder=first)
    marker.write_text(first)  # as if it had been killed before it was done
    assert home.start("two") == second
    assert not marker.exists()


def test_a_folder_that_is_not_lost_costs_no_jobs(home: Home, tmp_path: Path) -> None:
    home.has_files = False
    theirs, own = home.database, f"sqlite:///{tmp_path / 'own.db'}"
    first = home.start("one")
    home.database = own
    home.start("two")
    store = Store(own)

    async def job() -> JobRecord:
        await store.deploy([spec()])
        record, _ = await store.submit(draft())
        return (await store.apply(record.spec.job_id, EVENTS[Event.CLAIM])).job or record

    running = asyncio.run(job())
    home.database = theirs
    with operator_on(theirs, first), pytest.raises(StartupError, match=f"{first} is not lost"):
        home.start("two", lost_folder=first)
    home.database = own
    home.start("two")
    assert asyncio.run(store.job(running.spec.job_id)) == running
    store.close()
    home.database = theirs
    home.is_left()
    home.start("two", lost_folder=first)  # now it is


def test_an_id_that_cannot_be_read_is_told(home: Home) -> None:
    home.start("one")
    (home.folder / "one" / "folder.id").write_bytes(b"\xff")
    with pytest.raises(StartupError, match=r"folder\.id cannot be read"):
        home.start("one")
    (home.folder / "three").mkdir()
    (home.folder / "three" / "folder.id").mkdir()
    with pytest.raises(StartupError, match=r"folder\.id cannot be read"):
        home.start("three")
