"""A real operator on a simulated cluster: `simulated.py DATA_DIR NODES CORES [STORE]`.

Store, dispatcher, HTTP and the choice of nodes are the operator's own; only the nodes are
simulated. `scale.py` runs it. Each line on stdin is a command:

    count            change nothing
    idle             jobs run on
    flow N LIMIT     end N jobs, and each job that starts from now on at once, up to LIMIT ends
    end              end all running jobs

Each command gets one line of JSON on stdout: the numbers of starts and ends until now, and the
longest stall of the event loop since the previous command.
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
    """A cluster of equal nodes, whose agents answer."""
    total = Capacity(cores * MILLI, 0, 0)
    placement = Placement(report_freed)
    placement.update(tuple(NodeState(name(n), name(n), True, total, NOTHING) for n in range(count)))
    for node in placement.alive.values():
        node.is_ready = True
    return placement


def name(number: int) -> str:
    return f"node-{number:05}"


class SimulatedEngine:
    """An engine whose nodes are simulated. The Ray engine's `Placement` chooses the node."""

    def __init__(self, count: int, cores: int) -> None:
        self.ledger = cluster(count, cores, lambda: self._report(CapacityFreed()))
        self._running: dict[str, Started] = {}
        self._report: Report = lambda _: None
        self._flow_limit = 0  # of `ends`: at it jobs no longer end by themselves
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
        if self.ends < self._flow_limit:
            asyncio.get_running_loop().call_soon(self._end, job_id, Ending.EXITED)

    def stop(self, job_id: str) -> None:
        asyncio.get_running_loop().call_soon(self._end, job_id, Ending.STOPPED)

    async def recover(self, attempt: Attempt) -> None:
        job_id, node = attempt.spec.job_id, json.loads(attempt.handle)["node"]
        self.ledger.reserve_granted(job_id, attempt.version.api.compute, node)
        self._running[job_id] = Started(job_id, attempt.number, time.time_ns())

    def warm(self, version: Version) -> None: ...

    def forget(self, *, versions: Sequence[str] = (), jobs: Sequence[str] = ()) -> None: ...

    def carry_out(self, word: str, count: int, limit: int) -> None:
        """Carry out one command."""
        if word == "count":
            return
        self._flow_limit = self.ends + limit
        ending = {"idle": 0, "flow": count, "end": len(self._running)}[word]
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


class LoopStalls:
    """Measures the longest stall of the event loop."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def run(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_S)
            self.worst_s = max(self.worst_s, time.monotonic() - before - TICK_S)

    def take_worst(self) -> float:
        worst_s, self.worst_s = self.worst_s, 0.0
        return worst_s


async def carry_out_commands(engine: SimulatedEngine, stalls: LoopStalls) -> None:
    """Carry out the commands on stdin until it ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        word, *numbers = line.split()
        count, limit = map(int, numbers or (0, 0))
        engine.carry_out(word, count, limit)
        done = {"starts": engine.starts, "ends": engine.ends, "stall_s": stalls.take_worst()}
        print(json.dumps(done), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # `scale.py` has exited, perhaps by SIGKILL


async def main() -> None:
    data_dir, count, cores, *store = sys.argv[1:]
    engine = SimulatedEngine(int(count), int(cores))
    stalls = LoopStalls()
    app.engine_factory = lambda *_: lambda: engine
    settings = Settings(Path(data_dir), store[0] if store else None, port=0)
    tasks = [
        asyncio.create_task(stalls.run()),
        asyncio.create_task(carry_out_commands(engine, stalls)),
    ]
    await app.run(settings, lambda url: print(url, flush=True))
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main())
