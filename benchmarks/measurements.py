"""The measurements by name, each with the services that it compares. `run` calls them."""

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
import memory
import one_round
import stored
from figures import Measured, PeerFailed, Results, interleave
from kinds import (
    ALL_CORES,
    BARE_ECHO,
    BEHIND_WAITING,
    COMMITS,
    CORES,
    ECHO,
    FEW,
    IMPORTED_AHEAD,
    IMPORTED_BY_EACH,
    INTERPRETER,
    MANY,
    ON_POSTGRESQL,
    ONE_CORE,
    OURS,
    SIZES,
    WAITING,
)
from load import flood
from ours import Cortex, operator
from paused import PausedProcesses, started_processes
from peers.registry import PEERS
from service import Service
from stored import Stored

_SETTLE_S = 12  # an operator keeps surplus supervisors for ten seconds
_QUICK_DIVISOR = 100  # of the numbers of stored jobs, with `--quick`


@dataclass(frozen=True)
class Options:
    """Which measurements run, and how large they are."""

    only: Sequence[str]
    rounds: int
    jobs: int
    peers: bool
    quick: bool


class Bench:
    """One measurement. The services that it starts end with it."""

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

    def ours(self, *names: str, folder: Path | None = None, store: str | None = None) -> Cortex:
        """An operator with these APIs, in this folder or a new one, on SQLite or this store."""
        return self._stack.enter_context(
            operator(folder or self.folder("ours"), names, store=store)
        )

    def postgresql(self) -> str:
        """The URL of a new database on a new server."""
        sys.path.append(str(Path(__file__).parents[1] / "tests"))
        from postgresql_server import server  # only this measurement needs the tests

        made = self._stack.enter_context(server())
        return made.url(made.create())

    def echo(self) -> limits.Echo:
        return self._stack.enter_context(limits.echo(self.folder("echo")))

    def of_peers(
        self, names: Iterable[str], measure: Callable[[Service], Measured]
    ) -> dict[str, Callable[[], Measured]]:
        """The subjects for these peers; none without `--peers`. Starts the peers, and pauses each
        one except while it is measured."""
        measured: dict[str, Callable[[], Measured]] = {}
        for name in names if self.options.peers else ():
            before = started_processes()
            try:
                peer = self._opened(name)
            except PeerFailed as error:
                measured[name] = partial(_fail, error)
                continue
            paused = PausedProcesses(started_processes() - before)
            self._stack.callback(paused.resume)
            measured[peer.name] = partial(
                _of_peer, partial(paused.while_running, partial(measure, peer))
            )
        return measured

    def _opened(self, name: str) -> Service:
        """Start a peer, which runs until this measurement ends. Prints an error at its end.

        Raises:
            PeerFailed: the peer does not start.
        """
        opened = PEERS[name](self.folder(name))

        def close(*exc: Any) -> None:
            try:
                opened.__exit__(*exc)
            except Exception as error:
                print(f"{name} did not end as it should: {_one_line(error)}", file=sys.stderr)

        try:
            peer = opened.__enter__()
        except Exception as error:
            raise PeerFailed(_one_line(error)) from error
        self._stack.push(close)
        return peer

    def stored(self) -> dict[str, Stored]:
        """Operators with few and many finished jobs."""
        sizes = SIZES
        if self.options.quick:
            sizes = {name: SIZES[name] // _QUICK_DIVISOR for name in (FEW, MANY)}
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
        raise PeerFailed(_one_line(error)) from error


def _fail(error: PeerFailed) -> Measured:
    raise error


def _one_line(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__


def submit(bench: Bench) -> None:
    """The rate of submits that are durably stored."""
    ours, echo, jobs = bench.ours("later"), bench.echo(), bench.options.jobs
    bench.measure(
        "submit",
        {
            OURS: lambda: one_round.submit_rate(ours, jobs),
            ECHO: lambda: echo.rate(2 * jobs),
            BARE_ECHO: lambda: echo.rate(2 * jobs, "/bare"),
            COMMITS: lambda: limits.grouped_commits(bench.folder("commits"), 10 * jobs),
            **bench.of_peers(("rq", "celery"), lambda peer: one_round.submit_rate(peer, jobs)),
        },
    )


def end_to_end(bench: Bench) -> None:
    """The rate of jobs from submit to end."""
    ours, jobs = bench.ours("noop"), bench.options.jobs
    bench.measure(
        "end-to-end",
        {
            OURS: lambda: one_round.end_to_end(ours, jobs),
            ALL_CORES: lambda: limits.supervised_fork(bench.folder("forks"), jobs, CORES),
            ONE_CORE: lambda: limits.supervised_fork(bench.folder("forks"), jobs),
            **bench.of_peers(
                PEERS, lambda peer: one_round.end_to_end(peer, max(4, int(jobs * peer.share)))
            ),
        },
    )


def first_line(bench: Bench) -> None:
    """The time from a submit to the job's start, on an idle operator and while other jobs wait."""
    ours, behind = bench.ours("noop"), bench.ours("noop", "queued")
    flood(behind.url, [behind.submit("queued")] * (WAITING + 1))
    number = max(10, bench.options.jobs // 5)
    bench.measure(
        "first-line",
        {
            OURS: lambda: _percentiles(one_round.first_lines(ours, number)),
            BEHIND_WAITING: lambda: _percentiles(one_round.first_lines(behind, number)),
            INTERPRETER: lambda: {"p50": limits.interpreter()},
            **bench.of_peers(
                PEERS,
                lambda peer: _percentiles(
                    one_round.first_lines(peer, max(3, int(number * peer.share)))
                ),
            ),
        },
    )


def stop(bench: Bench) -> None:
    """The time from a stop to the exit of the job's process."""
    ours, number = bench.ours("sleeper"), max(2, bench.options.jobs // 50)

    def of(service: Service) -> float:
        few = max(1, int(number * min(1, service.share * 10)))
        return statistics.median(one_round.stops(service, few, bench.folder("stop")))

    bench.measure("stop", {OURS: lambda: of(ours), **bench.of_peers(PEERS, of)})


def idle_memory(bench: Bench) -> None:
    """The memory of an idle operator that has run some jobs."""
    ours, jobs = bench.ours("noop"), bench.options.jobs

    def idle() -> dict[str, float]:
        one_round.end_to_end(ours, jobs)
        time.sleep(1)
        burst = memory.pss(memory.tree(ours.pid))
        time.sleep(_SETTLE_S)
        operator, *others = memory.tree(ours.pid)
        own, beside = memory.pss([operator]), memory.pss(others)
        return {"memory": own + beside, "operator": own, "others": beside, "after-burst": burst}

    bench.measure("idle", {OURS: idle})


def crowd(bench: Bench) -> None:
    """A thousand jobs that run at once."""
    ours, number = bench.ours("sleeper"), 2 * bench.options.jobs

    def all_at_once() -> dict[str, float]:
        crowd_figures = one_round.crowd(ours, number, bench.folder("crowd"))
        return {
            "starts": crowd_figures.start_rate,
            "stops": crowd_figures.stop_rate,
            "memory": crowd_figures.beyond_mb,
            "own-memory": crowd_figures.own_mb,
        }

    bench.measure("crowd", {OURS: all_at_once})


def stored_jobs(bench: Bench) -> None:
    """The speed of jobs beside few and many stored finished jobs."""
    operators, jobs = bench.stored(), bench.options.jobs

    def of(operator: Stored) -> dict[str, float]:
        lines = one_round.first_lines(operator.cortex, max(10, jobs // 10))
        ended = one_round.end_to_end(operator.cortex, jobs)
        operator.add_later()
        submitted = one_round.submit_rate(operator.cortex, jobs)
        operator.remove_later()
        return {"first-line": statistics.median(lines), "end-to-end": ended, "submit": submitted}

    bench.measure("stored", {name: partial(of, operator) for name, operator in operators.items()})


def stored_status(bench: Bench) -> None:
    """The speed of statuses, and of the operator's start, with few and many finished jobs."""
    operators, number = bench.stored(), 4 * bench.options.jobs

    def of(operator: Stored) -> dict[str, float]:
        found = one_round.statuses(operator.cortex, operator.sample, number)
        operator.stop()
        return {
            "status": found["rate"],
            "status-p99": found["p99"],
            "start-up": operator.start(),
        }

    bench.measure("stored", {name: partial(of, operator) for name, operator in operators.items()})


def stores(bench: Bench) -> None:
    """The speed of jobs on SQLite and on PostgreSQL."""
    sqlite, postgresql = bench.ours("noop"), bench.ours("noop", store=bench.postgresql())
    jobs = bench.options.jobs

    def of(ours: Cortex) -> dict[str, float]:
        return {
            "end-to-end": one_round.end_to_end(ours, jobs),
            "first-line": statistics.median(one_round.first_lines(ours, max(10, jobs // 10))),
        }

    bench.measure("stores", {OURS: partial(of, sqlite), ON_POSTGRESQL: partial(of, postgresql)})


def machine_limits(bench: Bench) -> None:
    """The machine's rate of forks, on one core and on all."""
    number = 2 * bench.options.jobs
    bench.measure(
        "forks",
        {
            "on one core": lambda: limits.fork_and_exit(number),
            "on all cores": lambda: limits.fork_and_exit(number, CORES),
        },
    )


def imports(bench: Bench) -> None:
    """The cost of a library for each job that imports it, and the gain of importing it ahead."""
    ours, number = bench.ours("learner", "learner-ahead"), max(4, bench.options.jobs // 25)

    def of(task: str) -> dict[str, float]:
        lines = one_round.first_lines(ours, number, task)
        rate = one_round.end_to_end(ours, number, task)
        crowd_figures = one_round.crowd(ours, CORES, bench.folder("learners"), task)
        return {
            "first-line": statistics.median(lines),
            "end-to-end": rate,
            "memory": crowd_figures.own_mb + crowd_figures.beyond_mb,
        }

    bench.measure(
        "imports",
        {IMPORTED_BY_EACH: partial(of, "learner"), IMPORTED_AHEAD: partial(of, "learner-ahead")},
    )


def aged(bench: Bench) -> None:
    """The rate of jobs and the time to their start in a folder where files were just removed: of
    our operator, and of a supervised fork that writes its record there."""
    folder, jobs = bench.folder("aged"), bench.options.jobs
    limits.age(folder, 6 * jobs)
    ours = bench.ours("noop", folder=folder / "ours")

    def of_ours() -> dict[str, float]:
        limits.age(folder, 6 * jobs)
        rate = one_round.end_to_end(ours, jobs)
        limits.age(folder, 6 * jobs)
        lines = one_round.first_lines(ours, max(10, jobs // 10))
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
    "stores": stores,
    "limits": machine_limits,
    "imports": imports,
    "aged": aged,
}


def _percentiles(values: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(values), "p99": one_round.quantile(values, 99)}
