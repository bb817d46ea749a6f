"""The engine protocol: all that the operator knows of where workers run.

An engine starts, stops and recovers attempts of jobs, and reports what it observes. It never writes
a status: the dispatcher turns observations into events of the life cycle. Every engine passes
`tests/engines`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import JsonValue

from cortex.spec.api import ApiSpec, Compute
from cortex.spec.job import JobSpec

if TYPE_CHECKING:
    from cortex.engines.capacity import CapacityLedger


@dataclass(frozen=True)
class Version:
    """A deployed version on the operator's machine: what its workers need."""

    api: ApiSpec
    project: Path
    """The project's files. The engine brings them to the machine where the worker runs."""
    python: Path
    """The interpreter of the environment. Engines with `builds_environments` do not use it."""
    env: Mapping[str, str]
    """Variables of `.env` and `definition.env`, merged."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at running a job. The job's code is started at most once in each attempt."""

    spec: JobSpec
    version: Version
    number: int
    handle: str
    """What `Engine.claim` gave. The store has it before `Engine.start` is called."""
    deadline: float | None = None
    """When the engine ends the attempt, by this machine's monotonic clock: an administrator may set
    the wall clock meanwhile."""
    losses: int = 0
    """How many attempts of the job were lost before. The job finds it in its environment."""
    lost: str | None = None
    """Why the previous attempt was lost. The job's log says it."""
    grace_s: float | None = None
    """Seconds between SIGTERM and SIGKILL. None: the engine's own."""


class Ending(StrEnum):
    """Why a worker ended."""

    EXITED = "exited"  # on its own: see exit_code
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    STOPPED = "stopped"  # by `Engine.stop`, or by a signal to the supervisor


@dataclass(frozen=True)
class Started:
    """The attempt's worker has started. Not reported for attempts shorter than a few milliseconds;
    their Ended has `start_ns`."""

    job_id: str
    attempt: int
    start_ns: int


@dataclass(frozen=True)
class Waits:
    """The attempt's worker has not started yet, for this reason."""

    job_id: str
    attempt: int
    reason: str


@dataclass(frozen=True)
class Ended:
    """The attempt's worker has ended, and no process of the attempt is left."""

    job_id: str
    attempt: int
    ending: Ending
    start_ns: int
    end_ns: int
    exit_code: int
    """Negative: the signal that ended it."""
    message: str | None
    result: JsonValue
    has_result: bool
    measures: tuple[object, ...] = ()
    """What the task counted and measured, as `worker.job.metrics` writes it."""
    hints: tuple[str, ...] = ()
    """Advice for the users of the version, as on the time that each job spends on imports."""


@dataclass(frozen=True)
class Lost:
    """The platform failed the attempt, and no process of the attempt is left."""

    job_id: str
    attempt: int
    reason: str
    is_final: bool = False
    """Whether another attempt would fail for the same reason."""


@dataclass(frozen=True)
class NeverStarted:
    """The attempt was fenced off before any code of the job ran. None will run."""

    job_id: str
    attempt: int
    held_up_by: str | None = None
    """What the machine lacked, if that is the reason: another attempt waits for it. The agents of
    Ray's nodes pickle it, and they outlive an upgrade of the operator: its name stays."""


@dataclass(frozen=True)
class Unreachable:
    """The state of the attempt cannot be read now. Another observation follows when it can."""

    job_id: str
    attempt: int
    reason: str


@dataclass(frozen=True)
class Reachable:
    """The state of the attempt can be read again, and has not changed."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class CapacityFreed:
    """A job that did not fit before may fit now."""


Observation = (
    Started | Waits | Ended | Lost | NeverStarted | Unreachable | Reachable | CapacityFreed
)
Report = Callable[[Observation], None]


@dataclass(frozen=True, slots=True)
class Capacity:
    """An amount to run jobs on: CPU in thousandths of a core, memory in bytes, a number of GPUs."""

    cpu_m: int
    mem: int
    gpu: int

    def __add__(self, other: Capacity) -> Capacity:
        return Capacity(self.cpu_m + other.cpu_m, self.mem + other.mem, self.gpu + other.gpu)

    def __sub__(self, other: Capacity) -> Capacity:
        return Capacity(self.cpu_m - other.cpu_m, self.mem - other.mem, self.gpu - other.gpu)

    def minimum(self, other: Capacity) -> Capacity:
        """The smaller amount of each kind."""
        return Capacity(
            min(self.cpu_m, other.cpu_m), min(self.mem, other.mem), min(self.gpu, other.gpu)
        )

    def maximum(self, other: Capacity) -> Capacity:
        """The larger amount of each kind."""
        return Capacity(
            max(self.cpu_m, other.cpu_m), max(self.mem, other.mem), max(self.gpu, other.gpu)
        )


NOTHING = Capacity(0, 0, 0)


@dataclass(frozen=True)
class Capabilities:
    """What an engine is and can do, as data (`/-/info` shows it)."""

    name: str
    total: Capacity
    memory_limit: str
    """How `compute.mem` is enforced: "cgroup v2", "cgroup v1" or "watchdog"."""
    own_folder: str
    """How each job gets the project to itself: "overlay" or "copy"."""
    builds_environments: bool = False
    """Whether the engine builds the environments of versions, on the machines where workers run."""
    may_grow: bool = False
    """Whether larger machines may appear without the operator's doing, or some are unknown now: a
    refusal of the ledger may pass then."""
    problem: str | None = None
    """Why the engine can start no job now and cannot read the state of jobs."""


@dataclass(frozen=True)
class NodeInfo:
    """A machine that jobs run on."""

    name: str
    is_ready: bool
    total: Capacity
    free: Capacity
    problem: str | None = None
    """Why the machine is not ready."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What `compute.node_labels` selects by."""


class Engine(Protocol):
    """Runs attempts somewhere. All methods are called on the event loop and do not block it.

    For each attempt the operator calls, in this order: `ledger.reserve`, `claim`, optionally
    `prepare`, and, once the store has the handle, `start`. `ledger.release` takes the place of
    `start` where the attempt is not going to be started. After a restart of the operator a new
    engine gets `recover` for each attempt that the store holds as claimed.

    An engine reports exactly one of Ended, Lost and NeverStarted for each attempt that it started
    or recovered, and gives back the attempt's capacity before that. It may call `report` at any
    time on the loop while it is open, also before `start` returns. Jobs survive their operator:
    neither `close` nor SIGKILL of the operator's process ends a job, and neither counts as a stop.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do. Readable at any time; `total` and the methods that the engine
        detects are known once it is open."""

    @property
    def ledger(self) -> CapacityLedger:
        """What there is to run on, and which job has reserved what of it. The same object as long
        as the engine lives."""

    async def open(self, report: Report) -> None:
        """Make the engine ready, and report to `report` from now on.

        A cluster that cannot be reached now is no error: the engine opens, `capabilities.problem`
        says why, attempts are Unreachable, and the engine retries until it reaches the cluster.

        Call it once, before all methods but `capabilities` and `ledger`. A closed engine cannot be
        opened again: make a new one on the same folder. An engine that is opened after a restart
        knows no attempt before `recover` is called for it.

        Raises:
            StartupError: this machine lacks what the engine needs for good; the message says what.
                `close` must be called all the same.
        """

    async def close(self) -> None:
        """Release all resources but the jobs: their workers go on. Report nothing from now on.

        Call it once, last, also after an `open` that failed. A new engine recovers the attempts.
        """

    def claim(self, job_id: str, attempt: int) -> str:
        """The handle for an attempt that is about to start: versioned, opaque to the operator, and
        all that `recover` needs.

        Call it after `ledger.reserve` for the job. A second call for the same attempt gives an
        equivalent handle. The handle stays valid after a restart of the operator or the machine. A
        claim runs nothing, and needs no `recover` if its handle never reaches the store. It may
        leave the job's empty folder, which is the caller's to remove.

        Raises:
            OSError: the engine's storage accepts no write now.
        """

    def prepare(self, attempt: Attempt) -> None:
        """A hint: the attempt was claimed, and `start` follows once the store has the handle. The
        engine may use that time to set up whatever does not run the job's code.

        Call it at most once for an attempt, after `claim`. Either `start` or `ledger.release`
        follows, and `ledger.release` undoes it. After a restart nothing of it runs: `recover`
        fences off an attempt that was only prepared.
        """

    def start(self, attempt: Attempt) -> None:
        """Start the attempt's worker. The engine reports the outcome, failures to start included.

        Call it exactly once for an attempt, after the store has the handle that `claim` gave. The
        attempt's code runs at most once: where the operator restarts meanwhile, `recover` with the
        same handle finds the attempt running, ended, or fences it off.
        """

    def stop(self, job_id: str) -> None:
        """End the job's attempt: SIGTERM, a grace period, SIGKILL, to the whole process tree. The
        engine reports the outcome.

        Call it at any time while the engine is open. It has no effect on a job whose end was
        reported or that the engine does not know. A second call does not prolong the grace period.
        A stop is not remembered over a restart: call it again after `recover`.
        """

    def demand(self, waiting: Sequence[Compute]) -> None:
        """A hint: these jobs could start now, if there was capacity for them. An engine whose
        machines can become more may get more.

        Call it at any time while the engine is open, when the list has changed. It replaces the
        list of the call before; a closed engine has none.

        Args:
            waiting: what the first waiting jobs need, in the order in which they are to start.
        """

    async def recover(self, attempt: Attempt) -> None:
        """Take over an attempt that an earlier operator claimed, started or not. The engine reports
        its state, and counts its capacity as reserved, even if that exceeds what is free.

        Call it once for each such attempt, after `open` and before jobs reserve capacity. An
        attempt that has not begun is fenced off and reported as NeverStarted: it never runs.
        """

    def warm(self, version: Version) -> None:
        """A hint: jobs of this version are likely. The engine may keep processes ready for them.

        Call it at any time while the engine is open. A second call has no effect. The hint is not
        remembered over a restart.
        """

    def forget(self, *, versions: Sequence[str] = (), jobs: Sequence[str] = ()) -> None:
        """A hint: no job of these versions will come, and the data of these jobs is no longer
        needed. The engine deletes what it keeps of them elsewhere; the caller deletes the job
        folders on the operator's machine (`cortex.joblog.folders`).

        Call it at any time, for jobs whose end was reported; an engine that is not open ignores it.
        A second call has no effect. The hint is not remembered over a restart: what an engine
        cannot delete at once, as on a node that is out of reach, stays there.

        Args:
            versions: the ids of versions.
            jobs: the ids of jobs.
        """
