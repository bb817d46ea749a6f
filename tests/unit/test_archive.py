"""Logs in the store of files, where operators on one store have data folders of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cortex.engines.local import LocalEngine
from cortex.errors import NoDriver
from cortex.operator.archive import Archive
from cortex.projects.files import Files
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import State, Wanted
from cortex.store import Store

_SPEC = JobSpec(job_id="1", api_name="a", api_id="1", config={}, created_ns=1)
OVER = JobRecord(1, _SPEC, State.SUCCEEDED, Wanted.RUN, attempt=1, handle=None)


class Reader:
    """An operator that does not drive."""

    def __init__(self, folder: Path) -> None:
        for name in ("files", "jobs", "archived"):
            (folder / name).mkdir()
        self.log = folder / "jobs" / OVER.spec.job_id / "log"
        self.files = Files(f"file://{folder / 'files'}")
        self.store = Store(f"sqlite:///{folder / 'operator.db'}")
        engine = LocalEngine(folder / "jobs")
        marks = folder / "archived"
        self.archive = Archive(self.files, engine, self.store, marks, is_apart=True)

    def bring_back(self) -> None:
        asyncio.run(self.archive.bring_back(OVER))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    made = Reader(tmp_path)
    yield made
    made.archive.end()
    made.store.close()


def test_what_is_not_there_yet_may_be_with_whoever_drives(reader: Reader) -> None:
    with pytest.raises(NoDriver, match="not in the store of files yet"):
        reader.bring_back()
    reader.files.put("logs/1/log", b"all of it")
    reader.bring_back()
    assert reader.log.read_bytes() == b"all of it"


def test_what_is_here_of_an_earlier_term_is_not_taken_for_all_of_it(reader: Reader) -> None:
    reader.log.parent.mkdir()
    reader.log.write_bytes(b"all")
    with pytest.raises(NoDriver):
        reader.bring_back()
    reader.files.put("logs/1/log", b"all of it")
    reader.bring_back()
    assert reader.log.read_bytes() == b"all of it"
    assert asyncio.run(reader.archive.has("1"))
