"""A real operator on a cluster that is not there: `simulated.py DATA_DIR NODES CORES [STORE]`, run by `scale.py`.

Store, dispatcher, HTTP and the choice of nodes are the operator's own; what is played is what nodes do. A
line on stdin tells it what: `hold`, jobs run on; `flow N MOST`, N end, and those that start from now on as soon
as they have started, MOST in all; `end`, all end that run now. To each it says on stdout, as JSON, what was done so far.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cortex.engines.base import (
    NOTHING,
    Attempt,
    Capabilities,
    Capacity,
    CapacityFreed,
    Ended,
    Ending,
    Report,
    Started,
    Version,
)
from cortex.engines.ray.messages import NodeState
from cortex.engines.ray.placement import Placement
from cortex.operator import app
from cortex.operator.config.settings import Settings
from cortex.spec.quantities import MILLI

TICK_S = 0.01


def cluster(count: int, cores: int, report_freed: Callable[[], object] = lambda: None) -> Placement:
    """So many nodes, all alike, whose agents answer."""
    total = Capacity(cores * MILLI, 0, 0)
    made = Placement(report_freed)
    made.update(tuple(NodeState(name(n), name(n), True, total, NOTHING) for n in range(count)))
    for node in made.alive.values():
        node.is_ready = True
    return made


def name(number: int) -> str:
    return f"node-{number:05}"


class SimulatedEngine:
    """The protocol of an engine; the choice of a node is the Ray engine's."""

    def __init__(self, count: int, cores: int) -> None:
        self.ledger = cluster(count, cores, lambda: self._report(CapacityFreed()))
        self._running: dict[str, Started] = {}
        self._report: Report = lambda _: None
        self._most = 0  # ends after which none ends by itself any more
        self.starts = self.ends = 0

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "simulated", self.ledger.total, "none", "none", builds_environments=True
        )

    async def open(self, report: Report) -> None:
        self._report = report

    async def close(self) -> None:
        self._report = lambda _: None

    def claim(self, job_id: str, attempt: int) -> str:
        node = self.ledger.node_of(job_id)
        return json.dumps({"node": "" if node is None else node.node_id})

    def prepare(self, attempt: Attempt) -> None:
        pass

    def start(self, attempt: Attempt) -> None:
        self.starts += 1
        job_id = attempt.spec.job_id
        started = Started(job_id, attempt.number, time.time_ns())
        self._running[job_id] = started
        self._report(started)
        if self.ends < self._most:
            asyncio.get_running_loop().call_soon(self._end, job_id, Ending.EXITED)

    def stop(self, job_id: str) -> None:
        asyncio.get_running_loop().call_soon(self._end, job_id, Ending.STOPPED)

    async def recover(self, attempt: Attempt) -> None:
        job_id, node = attempt.spec.job_id, json.loads(attempt.handle)["node"]
        self.ledger.reserve_granted(job_id, attempt.version.api.compute, node)
        self._running[job_id] = Started(job_id, attempt.number, time.time_ns())

    def warm(self, version: Version) -> None: ...

    def forget(self, *, versions: Sequence[str] = (), jobs: Sequence[str] = ()) -> None: ...

    def obey(self, word: str, count: int, most: int) -> None:
        """Carry out one of the words of stdin."""
        if word == "look":
            return
        self._most = self.ends + most
        ending = {"hold": 0, "flow": count, "end": len(self._running)}[word]
        for job_id in list(self._running)[:ending]:
            self._end(job_id, Ending.EXITED)

    def _end(self, job_id: str, ending: Ending) -> None:
        started = self._running.pop(job_id, None)
        if started is None:
            return
        self.ends += 1
        freed = self.ledger.remove_reservation(job_id) and self.ledger.pop_refused()
        now = time.time_ns()
        last = (started.start_ns, now, 0, None, None, False)
        self._report(Ended(job_id, started.attempt, ending, *last))
        if freed:
            self._report(CapacityFreed())


class Pulse:
    """How long the event loop was not its own."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def run(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_S)
            self.worst_s = max(self.worst_s, time.monotonic() - before - TICK_S)

    def taken(self) -> float:
        worst_s, self.worst_s = self.worst_s, 0.0
        return worst_s


async def obey(engine: SimulatedEngine, pulse: Pulse) -> None:
    """Do what stdin says, until it ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        word, *numbers = line.split()
        count, most = map(int, numbers or (0, 0))
        engine.obey(word, count, most)
        done = {"starts": engine.starts, "ends": engine.ends, "stall_s": pulse.taken()}
        print(json.dumps(done), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # who gave the words is gone, however it ended


async def main() -> None:
    data_dir, count, cores, *store = sys.argv[1:]
    engine = SimulatedEngine(int(count), int(cores))
    pulse = Pulse()
    app.engine_factory = lambda *_: lambda: engine  # what is simulated
    settings = Settings(Path(data_dir), store[0] if store else None, port=0)
    tasks = [asyncio.create_task(pulse.run()), asyncio.create_task(obey(engine, pulse))]
    await app.run(settings, lambda url: print(url, flush=True))
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main())
