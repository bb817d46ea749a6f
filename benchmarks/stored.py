"""Makes data folders of operators with many finished jobs in seconds: a real deploy, a real job,
and then the rows that many such jobs would have left, after retention removed their logs, through
the store's own schema. `measurements` uses it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

import ours
from cortex.operator.config.settings import database_url
from cortex.spec.lifecycle import State
from cortex.spec.times import new_id, now_ns
from cortex.store.database import connect
from cortex.store.schema import jobs
from load import Connection
from ours import Cortex

_BATCH = 50_000
_SPAN_NS = 60 * 86_400 * 10**9  # of the submits: retention keeps jobs of that age
_SAMPLE = 20_000


class Stored:
    """An operator with many finished jobs, which can be stopped and started."""

    cortex: Cortex

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number
        self._stack = ExitStack()
        self.sample: list[str] = []
        """Ids of finished jobs, at random."""

    def make(self) -> None:
        """Deploy, and store the jobs."""
        with ours.serving(self._folder) as cortex:
            cortex.deploy(self._folder, ("noop",))
        self.sample = _store(database_url(self._folder / "data", None), self._number)

    def start(self) -> float:
        """Start the operator, and return the seconds until it answers with the status of a job."""
        start = time.perf_counter()
        self.cortex = self._stack.enter_context(ours.serving(self._folder))
        with Connection(self.cortex.url) as connection:
            connection.send(self.cortex.status("noop", self.sample[0]))
        return time.perf_counter() - start

    def add_later(self) -> None:
        """Deploy `later`, whose jobs do not start."""
        self.cortex.deploy(self._folder, ("noop", "later"))

    def remove_later(self) -> None:
        """Delete `later`, which stops its jobs."""
        self.cortex.undeploy("later")

    def stop(self) -> None:
        """Stop the operator."""
        self._stack.close()


@contextmanager
def operator(folder: Path, number: int) -> Iterator[Stored]:
    """A running operator with so many finished jobs."""
    stored = Stored(folder, number)
    stored.make()
    stored.start()
    try:
        yield stored
    finally:
        stored.stop()


def _store(url: str, number: int) -> list[str]:
    """Store copies of a finished job with other ids and times, and return some of the ids."""
    engine = connect(url)
    chosen: list[str] = []
    with engine.connect().execution_options(writes=True) as connection:
        finished = select(jobs).where(jobs.c.state == State.SUCCEEDED.value).limit(1)
        template = dict(connection.execute(finished).mappings().one())
        connection.commit()
        del template["seq"]
        template["has_folder"] = False
        # By the driver's executemany: a million rows through all of SQLAlchemy take a minute.
        compiled = insert(jobs).values(template).compile(engine)
        columns = [*(compiled.positiontup or ())]  # type: ignore[attr-defined]  # SQLite's parameters have an order
        begin = now_ns() - _SPAN_NS
        for first in range(0, number, _BATCH):
            ids, rows = [], []
            for n in range(first, min(first + _BATCH, number)):
                job = _again(template, new_id(), begin + _SPAN_NS * n // number)
                ids.append(job["job_id"])
                rows.append(tuple(job[name] for name in columns))
            connection.exec_driver_sql(str(compiled), rows)
            connection.commit()
            chosen += random.sample(ids, min(len(ids), -(-_SAMPLE * len(ids) // number)))
    engine.dispose()
    random.shuffle(chosen)
    return chosen


def _again(job: dict[str, Any], job_id: str, created_ns: int) -> dict[str, Any]:
    """The row of a job, with another id and time."""
    later_ns = created_ns - job["created_ns"]
    spec = job["spec"].replace(job["job_id"], job_id)
    return {
        **job,
        "job_id": job_id,
        "spec": spec.replace(str(job["created_ns"]), str(created_ns)),
        "created_ns": created_ns,
        "start_ns": job["start_ns"] + later_ns,
        "end_ns": job["end_ns"] + later_ns,
    }
