"""The measurements by name: who is measured beside whom, and how often. `run` calls them."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import limits
import measures
import memory
import stored
from aside import Aside, started
from figures import Measured, PeerFailed, Results, interleave
from kinds import (
    AHEAD,
    ALL_CORES,
    BARE_ECHO,
    BEHIND,
    COMMITS,
    CORES,
    ECHO,
    FEW,
    IN_EACH,
    INTERPRETER,
    MANY,
    ONE_CORE,
    OURS,
    SIZES,
    WAITING,
)
from load import flood
from ours import Cortex, operator
from peers.registry import PEERS
from service import Service
from stored import Stored

_SETTLED_S = 12  # supervising processes that are more than idling needs are kept for ten seconds
_QUICK = 100  # times fewer stored jobs, to see whether it runs at all


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    only: Sequence[str]
    rounds: int
    jobs: int
    peers: bool
    quick: bool


class Bench:
    """One measurement: what it starts ends with it."""

    def __init__(
        self, options: Options, results: Results, folder: Path, out: Path | None = None
    ) -> None:
        """
        Args:
            out: the file that gets the results after each figure.
        """
        self.options = options
        self.results = results
        self._out = out
        self._folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.__exit__(*exc)  # type: ignore[arg-type]  # as the protocol has it

    def folder(self, name: str) -> Path:
        """A new folder."""
        folder = self._folder / f"{name}-{len(list(self._folder.iterdir()))}"
        folder.mkdir()
        return folder

    def ours(self, *names: str, folder: Path | None = None) -> Cortex:
        """An operator with these APIs, in this folder or a new one."""
        return self._stack.enter_context(operator(folder or self.folder("ours"), names))

    def echo(self) -> limits.Echo:
        return self._stack.enter_context(limits.echo(self.folder("echo")))

    def of_peers(
        self, names: Iterable[str], measure: Callable[[Service], Measured]
    ) -> dict[str, Callable[[], Measured]]:
        """What is measured of those peers, which run from here on, each while it is measured; none where
        they are not asked for."""
        measured: dict[str, Callable[[], Measured]] = {}
        for name in names if self.options.peers else ():
            before = started()
            try:
                peer = self._opened(name)
            except PeerFailed as error:
                measured[name] = partial(_fail, error)
                continue
            aside = Aside(started() - before)
            self._stack.callback(aside.release)
            measured[peer.name] = partial(_of_peer, partial(aside.back, partial(measure, peer)))
        return measured

    def _opened(self, name: str) -> Service:
        """A peer that runs until this measurement ends; an error of its end is printed.

        Raises:
            PeerFailed: it does not start.
        """
        opened = PEERS[name](self.folder(name))

        def close(*exc: Any) -> None:
            try:
                opened.__exit__(*exc)
            except Exception as error:
                print(f"{name} did not end as it should: {_words(error)}", file=sys.stderr)

        try:
            peer = opened.__enter__()
        except Exception as error:
            raise PeerFailed(_words(error)) from error
        self._stack.push(close)
        return peer

    def stored(self) -> dict[str, Stored]:
        """Operators that have finished few and many jobs."""
        sizes = SIZES
        if self.options.quick:
            sizes = {name: SIZES[name] // _QUICK for name in (FEW, MANY)}
        return {
            name: self._stack.enter_context(stored.operator(self.folder("stored"), size))
            for name, size in sizes.items()
        }

    def measure(self, figure: str, subjects: Mapping[str, Callable[[], Measured]]) -> None:
        try:
            interleave(self.results, self.options.rounds, figure, subjects)
        finally:
            if self._out is not None:
                self.results.save(self._out)


def _of_peer(measure: Callable[[], Measured]) -> Measured:
    try:
        return measure()
    except Exception as error:
        raise PeerFailed(_words(error)) from error


def _fail(error: PeerFailed) -> Measured:
    raise error


def _words(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__


def submit(bench: Bench) -> None:
    """How many submits a second are durably stored."""
    ours, echo, jobs = bench.ours("later"), bench.echo(), bench.options.jobs
    bench.measure(
        "submit",
        {
            OURS: lambda: measures.submit_rate(ours, jobs),
            ECHO: lambda: echo.rate(2 * jobs),
            BARE_ECHO: lambda: echo.rate(2 * jobs, "/bare"),
            COMMITS: lambda: limits.grouped_commits(bench.folder("commits"), 10 * jobs),
            **bench.of_peers(("rq", "celery"), lambda peer: measures.submit_rate(peer, jobs)),
        },
    )


def end_to_end(bench: Bench) -> None:
    """How many jobs a second are done."""
    ours, jobs = bench.ours("noop"), bench.options.jobs
    bench.measure(
        "end-to-end",
        {
            OURS: lambda: measures.end_to_end(ours, jobs),
            ALL_CORES: lambda: limits.supervised_fork(bench.folder("forks"), jobs, CORES),
            ONE_CORE: lambda: limits.supervised_fork(bench.folder("forks"), jobs),
            **bench.of_peers(
                PEERS, lambda peer: measures.end_to_end(peer, max(4, int(jobs * peer.share)))
            ),
        },
    )


def first_line(bench: Bench) -> None:
    """How long after its submit a job begins, when nothing else is to do, and when others wait."""
    ours, behind = bench.ours("noop"), bench.ours("noop", "queued")
    flood(behind.url, [behind.submit("queued")] * (WAITING + 1))
    number = max(10, bench.options.jobs // 5)
    bench.measure(
        "first-line",
        {
            OURS: lambda: _percentiles(measures.first_lines(ours, number)),
            BEHIND: lambda: _percentiles(measures.first_lines(behind, number)),
            INTERPRETER: lambda: {"p50": limits.interpreter()},
            **bench.of_peers(
                PEERS,
                lambda peer: _percentiles(
                    measures.first_lines(peer, max(3, int(number * peer.share)))
                ),
            ),
        },
    )


def stop(bench: Bench) -> None:
    """How long after its stop a job is gone."""
    ours, number = bench.ours("sleeper"), max(2, bench.options.jobs // 50)

    def of(service: Service) -> float:
        few = max(1, int(number * min(1, service.share * 10)))
        return statistics.median(measures.stops(service, few, bench.folder("stop")))

    bench.measure("stop", {OURS: lambda: of(ours), **bench.of_peers(PEERS, of)})


def idle_memory(bench: Bench) -> None:
    """What an operator takes when it has done some jobs and has nothing to do."""
    ours, jobs = bench.ours("noop"), bench.options.jobs

    def idle() -> dict[str, float]:
        measures.end_to_end(ours, jobs)
        time.sleep(1)
        burst = memory.pss(memory.tree(ours.pid))
        time.sleep(_SETTLED_S)
        operator, *others = memory.tree(ours.pid)
        own, beside = memory.pss([operator]), memory.pss(others)
        return {"memory": own + beside, "operator": own, "others": beside, "after-burst": burst}

    bench.measure("idle", {OURS: idle})


def crowd(bench: Bench) -> None:
    """A thousand jobs that run at once."""
    ours, number = bench.ours("sleeper"), 2 * bench.options.jobs

    def all_at_once() -> dict[str, float]:
        seen = measures.crowd(ours, number, bench.folder("crowd"))
        return {
            "starts": seen.start_rate,
            "stops": seen.stop_rate,
            "memory": seen.beyond_mb,
            "own-memory": seen.own_mb,
        }

    bench.measure("crowd", {OURS: all_at_once})


def stored_jobs(bench: Bench) -> None:
    """Whether jobs are as fast when many finished ones are stored."""
    operators, jobs = bench.stored(), bench.options.jobs

    def of(operator: Stored) -> dict[str, float]:
        lines = measures.first_lines(operator.cortex, max(10, jobs // 10))
        ended = measures.end_to_end(operator.cortex, jobs)
        operator.add_later()
        submitted = measures.submit_rate(operator.cortex, jobs)
        operator.remove_later()
        return {"first-line": statistics.median(lines), "end-to-end": ended, "submit": submitted}

    bench.measure("stored", {name: partial(of, operator) for name, operator in operators.items()})


def stored_status(bench: Bench) -> None:
    """Whether a status is found as fast, and an operator starts as fast, with many finished jobs."""
    operators, number = bench.stored(), 4 * bench.options.jobs

    def of(operator: Stored) -> dict[str, float]:
        found = measures.statuses(operator.cortex, operator.sample, number)
        operator.stop()
        return {
            "status": found["rate"],
            "status-p99": found["p99"],
            "start-up": operator.start(),
        }

    bench.measure("stored", {name: partial(of, operator) for name, operator in operators.items()})


def bare(bench: Bench) -> None:
    """What the machine gives at most, beside one another."""
    number = 2 * bench.options.jobs
    bench.measure(
        "forks",
        {
            "on one core": lambda: limits.fork_and_exit(number),
            "on all cores": lambda: limits.fork_and_exit(number, CORES),
        },
    )


def imports(bench: Bench) -> None:
    """What a library costs each job that imports it, and what importing it ahead spares."""
    ours, number = bench.ours("learner", "learner-ahead"), max(4, bench.options.jobs // 25)

    def of(task: str) -> dict[str, float]:
        lines = measures.first_lines(ours, number, task)
        rate = measures.end_to_end(ours, number, task)
        seen = measures.crowd(ours, CORES, bench.folder("learners"), task)
        return {
            "first-line": statistics.median(lines),
            "end-to-end": rate,
            "memory": seen.own_mb + seen.beyond_mb,
        }

    bench.measure("imports", {IN_EACH: partial(of, "learner"), AHEAD: partial(of, "learner-ahead")})


def aged(bench: Bench) -> None:
    """How many jobs a second are done, and how soon they begin, where files were removed up to the moment
    before: by ours, and by a supervised fork that writes its record there."""
    folder, jobs = bench.folder("aged"), bench.options.jobs
    limits.age(folder, 6 * jobs)
    ours = bench.ours("noop", folder=folder / "ours")

    def of_ours() -> dict[str, float]:
        limits.age(folder, 6 * jobs)
        rate = measures.end_to_end(ours, jobs)
        limits.age(folder, 6 * jobs)
        lines = measures.first_lines(ours, max(10, jobs // 10))
        return {"end-to-end": rate, "first-line": statistics.median(lines)}

    def of_forks(name: str, processes: int) -> dict[str, float]:
        limits.age(folder, 6 * jobs)
        records = folder / f"{name}-{len(list(folder.iterdir()))}"
        records.mkdir()
        return {"end-to-end": limits.supervised_fork(records, jobs, processes)}

    bench.measure(
        "aged",
        {
            OURS: of_ours,
            ALL_CORES: lambda: of_forks("all", CORES),
            ONE_CORE: lambda: of_forks("one", 1),
        },
    )


MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "submit": submit,
    "end-to-end": end_to_end,
    "first-line": first_line,
    "stop": stop,
    "idle-memory": idle_memory,
    "crowd": crowd,
    "stored-jobs": stored_jobs,
    "stored-status": stored_status,
    "limits": bare,
    "imports": imports,
    "aged": aged,
}


def _percentiles(values: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(values), "p99": measures.quantile(values, 99)}
