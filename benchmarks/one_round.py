"""The measurements of one service in one round. Each function returns one value or several."""

from __future__ import annotations

import os
import random
import select
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import memory
from load import CONNECTIONS, Connection, flood
from ours import Cortex
from service import Service


def submit_rate(service: Service, number: int) -> float:
    """Submits per second at 16 connections, of jobs that do not start."""
    return flood(service.url, [service.submit("later")] * number).rate


def end_to_end(service: Service, number: int, task: str = "noop") -> float:
    """Jobs per second from the first submit at 16 connections until the last job is final. Some
    jobs before them are not timed: since the service's last round, half a minute ago, other
    services have replaced much of its data in the machine's caches and memory.
    """
    _run_all(service, max(1, number // 5), task)
    return number / _run_all(service, number, task)


def _run_all(service: Service, number: int, task: str) -> float:
    """Seconds for so many jobs.

    Jobs start roughly in the order of their submits: once the last ones are done, all are. After
    the time is taken, this checks that all jobs have succeeded.
    """
    start = time.perf_counter()
    answers = flood(service.url, [service.submit(task)] * number).bodies
    ids = [service.job_id(answer) for answer in answers]
    with Connection(service.url) as connection:
        for job_id in ids[: -service.max_running - 2 * CONNECTIONS : -1]:
            service.finish(connection, task, job_id)
        elapsed = time.perf_counter() - start
    for answer in flood(service.url, [service.status(task, job_id) for job_id in ids]).bodies:
        assert service.result(answer) is not None, answer
    return elapsed


def first_lines(service: Service, number: int, task: str = "noop") -> list[float]:
    """Milliseconds from sending a submit to the first line of the task, one job at a time."""
    taken = []
    submit = service.submit(task)
    with Connection(service.url) as connection:
        for _ in range(number):
            sent = time.time_ns()
            job_id = service.job_id(connection.send(submit))
            taken.append((int(service.finish(connection, task, job_id)) - sent) / 1e6)
    return taken


def times_to_end(service: Service, number: int) -> list[float]:
    """Milliseconds from sending a submit to the answer that the job is final, one job at a time."""
    taken = []
    submit = service.submit("noop")
    with Connection(service.url) as connection:
        for _ in range(number):
            start = time.perf_counter()
            service.finish(connection, "noop", service.job_id(connection.send(submit)))
            taken.append((time.perf_counter() - start) * 1000)
    return taken


def stops(service: Service, number: int, folder: Path) -> list[float]:
    """Milliseconds from sending a stop until the job's process has exited, one job at a time."""
    taken = []
    with Fifo(folder / "started") as fifo, Connection(service.url) as connection:
        submit = service.submit("sleeper", {"fifo": str(fifo.path)})
        for _ in range(number):
            job_id = service.job_id(connection.send(submit))
            pidfd = os.pidfd_open(fifo.pids(1)[0])
            start = time.perf_counter()
            connection.send(service.stop("sleeper", job_id))
            await_exits([pidfd])
            taken.append((time.perf_counter() - start) * 1000)
    return taken


def statuses(service: Service, ids: Sequence[str], number: int) -> dict[str, float]:
    """Status requests per second at 16 connections for random jobs, and their 99th percentile in
    milliseconds."""
    asked = [service.status("noop", job_id) for job_id in random.choices(ids, k=number)]
    answered = flood(service.url, asked)
    return {"rate": answered.rate, "p99": quantile(answered.latencies_s, 99) * 1000}


def crowd(service: Cortex, number: int, folder: Path, task: str = "sleeper") -> Crowd:
    """Many sleeping jobs at once: all start, and then all stop."""
    with Fifo(folder / "started") as fifo:
        submit = service.submit(task, {"fifo": str(fifo.path)})
        before = memory.pss(memory.tree(service.pid))
        start = time.perf_counter()
        answers = flood(service.url, [submit] * number).bodies
        pids = fifo.pids(number)
        started_s = time.perf_counter() - start
    own = memory.pss(pids)
    whole = memory.pss(memory.tree(service.pid))
    pidfds = [os.pidfd_open(pid) for pid in pids]
    stops = [service.stop(task, service.job_id(answer)) for answer in answers]
    start = time.perf_counter()
    flood(service.url, stops)
    await_exits(pidfds)
    stopped_s = time.perf_counter() - start
    return Crowd(
        start_rate=number / started_s,
        stop_rate=number / stopped_s,
        own_mb=own / number,
        beyond_mb=(whole - before - own) / number,
    )


@dataclass(frozen=True)
class Crowd:
    """The figures of many jobs at once."""

    start_rate: float
    stop_rate: float
    own_mb: float
    beyond_mb: float
    """The growth of all processes' memory since idle, without the jobs' own processes, by job."""


def quantile(values: list[float], percent: int) -> float:
    """A percentile of at least two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


class Fifo:
    """A pipe to which each job writes its pid, as one line, when it has begun."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Fifo:
        os.mkfifo(self.path)
        # Also open for writing: otherwise the pipe is at its end while there is no writer.
        self._file = os.fdopen(os.open(self.path, os.O_RDWR), "rb", buffering=0)
        self._read = b""
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.path.unlink()

    def pids(self, number: int, timeout_s: float = 60) -> list[int]:
        """Wait until so many jobs have begun, and return their pids."""
        while self._read.count(b"\n") < number:
            if not select.select([self._file], [], [], timeout_s)[0]:
                begun = self._read.count(b"\n")
                raise RuntimeError(f"of {number} jobs only {begun} have begun")
            self._read += self._file.read(1 << 16)
        *lines, self._read = self._read.split(b"\n", number)
        return [int(line) for line in lines]


def await_exits(pidfds: list[int], timeout_s: float = 60) -> None:
    """Wait until these processes have ended."""
    poller = select.epoll()
    for fd in pidfds:
        poller.register(fd, select.EPOLLIN)
    remaining = len(pidfds)
    while remaining:
        ended = poller.poll(timeout_s)
        if not ended:
            raise RuntimeError(f"{remaining} stopped jobs have not ended within {timeout_s} s")
        for fd, _ in ended:
            poller.unregister(fd)
            os.close(fd)
        remaining -= len(ended)
    poller.close()
