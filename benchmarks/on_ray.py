"""The speed of operators on a Ray cluster beside those with the local engine, with each kind of
store, and beside Ray Jobs: `make bench-ray`.

All run at the same time on the same machine, and are measured in turn in each round. The clusters
have one node each, on the same machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import figures
import one_round
from figures import Results, interleave, number
from ours import CPU, LOCAL, operator
from paused import PausedProcesses, started_processes
from peers import ray_jobs
from peers.common import PYTHON
from service import Service

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import postgresql_server
import s3_server
from engines.ray_cluster import cluster

_LOCAL = "local, SQLite"
_COMPARED = ("engine-first-line", "engine-end", "engine-end-to-end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=500, help="jobs in each round")
    given = parser.parse_args()
    results = Results()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # this also stops what was started
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-ray-"))
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user
        services = _started(stack, Path(folder))
        subjects: dict[str, Callable[[], dict[str, float]]] = {
            name: partial(_measured, service, given.jobs) for name, service in services.items()
        }
        if PYTHON.exists():
            subjects[ray_jobs.RayJobs.name] = _of_ray_jobs(stack, Path(folder), given.jobs)
        interleave(results, given.rounds, "engine", subjects)
    print(figures.aligned([figures.HEAD[:4], *(row[:4] for row in results.rows())]))
    if not PYTHON.exists():
        print(f"{ray_jobs.RayJobs.name} is not measured: `make bench-ray` installs it")
    for figure in results.values:
        for name in subjects:
            if name != _LOCAL and figure in _COMPARED:
                ratio = statistics.median(results.ratios(figure, name, _LOCAL))
                print(f"{figure}: {number(ratio)} times the value of {_LOCAL}: {name}")


def _started(stack: ExitStack, root: Path) -> dict[str, Service]:
    """The operators, by engine and store. They run until the stack is closed."""
    postgresql = stack.enter_context(postgresql_server.server())
    s3 = stack.enter_context(s3_server.server())
    ray = stack.enter_context(cluster(cpus=2 * CPU))
    of_s3 = {name: value for name, value in os.environ.items() if name in s3.environment}
    stack.callback(os.environ.update, of_s3)
    os.environ.update(s3.environment)

    def on_ray(name: str) -> tuple[str, ...]:
        nodes = ("--ray-node-dir", str(root / f"nodes-{name}"))
        return ("--engine", "ray", "--ray-address", ray.address, *nodes)

    def opened(name: str, engine: tuple[str, ...], store: str | None = None) -> Service:
        return stack.enter_context(operator(root / name, ["noop"], engine, store))

    bucket = ("--files", f"s3://{s3.bucket()}")
    return {
        _LOCAL: opened("local", LOCAL),
        "local, PostgreSQL": opened("local-pg", LOCAL, postgresql.url(postgresql.create())),
        "Ray, SQLite": opened("ray", on_ray("ray")),
        "Ray, PostgreSQL and S3": opened(
            "ray-pg", (*on_ray("ray-pg"), *bucket), postgresql.url(postgresql.create())
        ),
    }


def _measured(service: Service, jobs: int) -> dict[str, float]:
    few = max(5, jobs // 10)
    return {
        "first-line": statistics.median(one_round.first_lines(service, few)),
        "end": statistics.median(one_round.times_to_end(service, few)),
        "end-to-end": one_round.end_to_end(service, jobs),
        "load": os.getloadavg()[0],
    }


def _of_ray_jobs(stack: ExitStack, root: Path, jobs: int) -> Callable[[], dict[str, float]]:
    """Ray Jobs, of which a few are enough to measure. Its processes are paused while others are
    measured."""
    folder = root / "ray-jobs"
    folder.mkdir()
    before = started_processes()
    service = stack.enter_context(ray_jobs.opened(folder))
    paused = PausedProcesses(started_processes() - before)
    stack.callback(paused.resume)
    few = max(2, int(jobs * service.share))
    return partial(paused.while_running, partial(_measured_peer, service, few))


def _measured_peer(service: Service, jobs: int) -> dict[str, float]:
    return {
        "first-line": statistics.median(one_round.first_lines(service, 3)),
        "end": statistics.median(one_round.times_to_end(service, 3)),
        "end-to-end": one_round.end_to_end(service, jobs),
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
