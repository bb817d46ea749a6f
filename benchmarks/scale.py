"""Measures an operator with 1,000 nodes and 100,000 waiting jobs: `make bench-scale`.

A real operator (`simulated`) has a real store, which is filled before it starts: jobs take every
core of the nodes, and all others wait. Each figure is beside that of a tenth of the size, which
shows what grows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import httpx
import sqlalchemy as sa

from cortex.projects.pack import pack
from cortex.spec.api import Compute
from cortex.spec.job import JobSpec
from cortex.spec.times import new_id, now_ns
from cortex.store import Store
from cortex.store.database import connect
from cortex.store.schema import jobs
from cortex.store.transitions import spec_text
from figures import aligned
from load import Connection
from memory import pss
from postgresql_server import server
from simulated import cluster, name

HERE = Path(__file__).parent
YAML = """
- name: many
  kind: TaskAPI
  definition: {path: task.py}
  compute: {cpu: 1}
- name: large
  kind: TaskAPI
  definition: {path: task.py}
  compute: {cpu: CORES}
"""
BATCH = 5000
FLOW_SIZE = 64
PAUSE_S = 0.05


@dataclass
class Size:
    """The size of the cluster and of the load."""

    nodes: int
    cores: int
    waiting: int
    seconds: float
    requests: int

    @property
    def running(self) -> int:
        return self.nodes * self.cores

    @property
    def tenth(self) -> Size:
        return replace(self, nodes=self.nodes // 10, waiting=self.waiting // 10)


@dataclass
class Operator:
    """A simulated operator, which takes commands on its stdin."""

    process: subprocess.Popen[str]
    url: str
    ready_s: float

    def command(self, line: str) -> dict[str, Any]:
        """Send a command, and return the operator's counts."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        return reply

    @property
    def mb(self) -> float:
        return pss([self.process.pid])


@dataclass
class Table:
    """Figures of a tenth and of the whole size."""

    rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, value: str) -> None:
        print(f"  {what}: {value}", file=sys.stderr)
        self.rows.setdefault(what, []).append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--cores", type=int, default=8, help="of each node; each job takes one")
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10, help="of the measured flow of jobs")
    parser.add_argument("--requests", type=int, default=300, help="of each kind")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # this also stops the operator
    size = Size(given.nodes, given.cores, given.waiting, given.seconds, given.requests)
    table = Table()
    for one in (size.tenth, size):
        measure_placement(one, table)
        measure_on_new_store(given.store, one, table)
    heads = ("", *(f"{each.nodes:,} nodes, {each.waiting:,} wait" for each in (size.tenth, size)))
    print(f"{os.cpu_count()} cores, {given.store}, {size.cores} jobs run on each node")
    print(aligned([heads, *((what, *values) for what, values in table.rows.items())]))


def measure_on_new_store(kind: str, size: Size, table: Table) -> None:
    """Measure an operator on a new store."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-")))
        store = None
        if kind == "postgresql":
            made = stack.enter_context(server())
            store = made.url(made.create())
        measure(folder, store, size, table)


def measure_placement(size: Size, table: Table) -> None:
    """Measure the choice of a node alone: one with capacity, and none where no node has it."""
    one, all_of_it = Compute(cpu_m=1000), Compute(cpu_m=1000 * size.cores)
    nodes = cluster(size.nodes, size.cores)
    for number in range(size.nodes):  # no node is empty, and none is full
        nodes.reserve_granted(f"held {number}", one, name(number))

    def taken() -> None:
        assert nodes.reserve("one", one) is None
        nodes.release("one")

    def refused() -> None:
        assert nodes.reserve("large", all_of_it) is not None

    table.add("choose a node and release it [µs]", f"{_each_s(taken) * 1e6:.0f}")
    table.add("refuse a job on all nodes [µs]", f"{_each_s(refused) * 1e6:.0f}")


def measure(folder: Path, store: str | None, size: Size, table: Table) -> None:
    url = store or f"sqlite:///{folder / 'data' / 'operator.db'}"
    with operator(folder, store, size) as running:
        api_ids = deploy(running.url, size)
        empty = running.mb
    fill(url, api_ids["many"], size)
    with operator(folder, store, size) as running:
        table.add("start, until the first answer [s]", f"{running.ready_s:.1f}")
        jobs_mb = running.mb - empty
        each_kb = jobs_mb * 1000 / (size.running + size.waiting)
        table.add("memory for the jobs [MB]", f"{jobs_mb:.0f} ({each_kb:.1f} KB each)")
        measure_requests(running, size, table)
        measure_flow(running, size, table)
        measure_burst(running, size, table)
        measure_delete(running, table)


def measure_requests(running: Operator, size: Size, table: Table) -> None:
    with Connection(running.url) as connection:
        body = json.dumps({}).encode()
        # The times of these submits are not measured.
        ids = [connection.ask("POST", "/large", body)["job_id"] for _ in range(4)]
        latency(table, "submit", lambda _: connection.ask("POST", "/large", body), size)
        latency(table, "status", lambda n: connection.ask("GET", f"/large/{ids[n % 4]}"), size)
        page = connection.ask("GET", "/large?limit=100")["job_statuses"]
        stops = [job["job_id"] for job in page if job["job_id"] not in ids]
        latency(
            table, "stop of a waiting job",
            lambda n: connection.ask("DELETE", f"/large/{stops[n]}"), size, len(stops),
        )  # fmt: skip
        latency(
            table, "list of 100 jobs", lambda _: connection.ask("GET", "/large?limit=100"), size, 20
        )
        latency(table, "`cortex get`", lambda _: connection.ask("GET", "/-/apis"), size, 5)
        latency(
            table, "`cortex cluster info`", lambda _: connection.ask("GET", "/-/cluster"), size, 5
        )


def measure_flow(running: Operator, size: Size, table: Table) -> None:
    """End a few jobs. Each job that starts on freed capacity ends at once, and frees it for the
    next job."""
    limit = size.waiting // 2  # other jobs stay waiting for the burst
    before = running.command(f"flow {FLOW_SIZE} {limit}")
    latencies: list[float] = []
    stalls: list[float] = []
    begin = time.monotonic()
    with Connection(running.url) as connection:
        passed_s, ends = 0.0, 0
        while passed_s < size.seconds and ends < limit:
            latencies.append(_timed_s(lambda: connection.ask("POST", "/many", b"{}")))
            time.sleep(PAUSE_S)
            after = running.command("count")
            stalls.append(after["stall_s"])
            passed_s, ends = time.monotonic() - begin, after["ends"] - before["ends"]
    running.command("idle")
    table.add("jobs started and ended [1/s]", f"{ends / passed_s:,.0f}")
    table.add("submit at that rate, p50, p99 [ms]", _percentiles(latencies))
    table.add("longest stall of the event loop at that rate [ms]", f"{max(stalls) * 1e3:.0f}")


def measure_burst(running: Operator, size: Size, table: Table) -> None:
    """End all running jobs in one moment, and wait until the same number has started."""
    before = running.command("count")
    begin = time.monotonic()
    running.command("end")
    with Connection(running.url) as connection:
        submit_s = _timed_s(lambda: connection.ask("POST", "/many", b"{}"))
        while running.command("count")["starts"] - before["starts"] < size.running:
            time.sleep(PAUSE_S)
    table.add(
        "all running jobs end at once: until the same number runs again [s]",
        f"{time.monotonic() - begin:.1f}",
    )
    table.add("a submit right after all have ended [s]", f"{submit_s:.1f}")


def measure_delete(running: Operator, table: Table) -> None:
    with Connection(running.url) as connection:
        took_s = _timed_s(lambda: connection.ask("DELETE", "/-/apis/many"))
    table.add("delete the API, which stops all jobs [s]", f"{took_s:.1f}")


def latency(
    table: Table, what: str, ask: Callable[[int], object], size: Size, limit: int = 10**9
) -> None:
    found = []
    for number in range(min(size.requests, limit)):
        found.append(_timed_s(partial(ask, number)))
    table.add(f"{what}, p50, p99 [ms]", _percentiles(found))


def deploy(url: str, size: Size) -> dict[str, str]:
    """Deploy the APIs, and return the ids of their versions."""
    yaml = YAML.replace("CORES", str(size.cores))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cortex.yaml").write_text(yaml)
        Path(folder, "task.py").write_text("def task(config): ...\n")
        archive = io.BytesIO()
        pack(Path(folder), archive)
    answer = httpx.post(
        f"{url}/-/apis",
        files={
            "config": ("cortex.yaml", yaml.encode()),
            "project": ("p.tar.gz", archive.getvalue()),
        },
    )
    return {each["api"]["spec"]["name"]: each["api"]["spec"]["api_id"] for each in answer.json()}


def fill(url: str, api_id: str, size: Size) -> None:
    """Store the jobs as an operator would have left them."""
    Store(url).close()
    engine = connect(url)
    created = now_ns()
    with engine.begin() as connection:
        for begin in range(0, size.running + size.waiting, BATCH):
            end = min(begin + BATCH, size.running + size.waiting)
            rows = [_row(number, api_id, created, size) for number in range(begin, end)]
            connection.execute(sa.insert(jobs), rows)
    engine.dispose()


def _row(number: int, api_id: str, created: int, size: Size) -> dict[str, object]:
    spec = JobSpec(new_id(), "many", api_id, json.dumps({"number": number}), created + number)
    runs = number < size.running
    return {
        "job_id": spec.job_id,
        "api_name": spec.api_name,
        "api_id": api_id,
        "spec": spec_text(spec),
        "created_ns": spec.created_ns,
        "state": "running" if runs else "waiting",
        "wanted": "run",
        "attempt": int(runs),
        "handle": json.dumps({"node": name(number % size.nodes)}) if runs else None,
        "start_ns": created + number if runs else None,
    }


@contextlib.contextmanager
def operator(folder: Path, store: str | None, size: Size) -> Iterator[Operator]:
    words = [str(folder / "data"), str(size.nodes), str(size.cores), *([store] if store else [])]
    begin = time.monotonic()
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "simulated.py"), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit((folder / "log").read_text()[-4000:])
        yield Operator(process, url, time.monotonic() - begin)
    finally:
        process.kill()  # its store is all that the next operator needs
        process.wait()


def _each_s(work: Callable[[], None]) -> float:
    """The mean time of one call."""
    times, begin = 0, time.perf_counter()
    while (passed_s := time.perf_counter() - begin) < 0.2:
        work()
        times += 1
    return passed_s / times


def _timed_s(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def _percentiles(found: list[float]) -> str:
    ordered = sorted(found)
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return f"{p50 * 1e3:.1f}, {p99 * 1e3:.1f}"


if __name__ == "__main__":
    main()
