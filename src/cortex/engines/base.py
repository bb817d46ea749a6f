"""The engine protocol: all that the operator knows of where workers run.

An engine starts, stops, recovers and cleans attempts of jobs, and reports what it observes. It never
writes a status: the dispatcher turns observations into events of the life cycle. Every engine passes
`tests/engines`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from cortex.spec.api import ApiSpec, Compute
from cortex.spec.job import JobSpec


@dataclass(frozen=True)
class Version:
    """A deployed version on the operator's machine: what a worker of it needs."""

    api: ApiSpec
    project: Path
    """Its files; an engine brings them to where the worker runs."""
    python: Path
    """The interpreter of its environment; not for engines that build that (`builds_environments`)."""
    env: Mapping[str, str]
    """Variables of `.env` and `definition.env`, merged."""


@dataclass(frozen=True)
class Attempt:
    """One try at running a job. A job's code is started at most once in each."""

    spec: JobSpec
    version: Version
    number: int
    handle: str
    """What `Engine.claim` gave; the store holds it before `Engine.start` is called."""
    deadline: float | None = None
    """When it is terminated, by this machine's monotonic clock: the wall clock may be set meanwhile."""
    losses: int = 0
    """How many of the job's attempts were lost before: the job is told, and its log."""
    lost: str | None = None
    """In which words the last of them was."""


class Ending(StrEnum):
    """Why a worker's run is over."""

    EXITED = "exited"  # by itself: see exit_code
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    STOPPED = "stopped"  # somebody asked the supervisor to stop it


@dataclass(frozen=True)
class Started:
    """The attempt's worker has started. Not told of one that is over within milliseconds, whose end
    tells of its start."""

    job_id: str
    attempt: int
    start_ns: int


@dataclass(frozen=True)
class Waits:
    """The attempt's worker has not started yet, and this is why."""

    job_id: str
    attempt: int
    reason: str


@dataclass(frozen=True)
class Ended:
    """The attempt's worker has ended, and no process of it is left."""

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
    """What its task counted and measured, as `worker.measures` tells it."""
    hints: tuple[str, ...] = ()
    """What the users of its version should know: what each job spends on imports, say."""


@dataclass(frozen=True)
class Lost:
    """The platform failed the attempt; no process of it is left."""

    job_id: str
    attempt: int
    reason: str
    is_final: bool = False
    """Whether another attempt would come to the same."""


@dataclass(frozen=True)
class NeverStarted:
    """The attempt was fenced off before any code of the job ran, and never will run."""

    job_id: str
    attempt: int
    held_up_by: str | None = None
    """What the machine lacked, where that is why: another attempt waits until it may be there."""


@dataclass(frozen=True)
class Unreachable:
    """The attempt cannot be asked after right now; another observation follows when it can."""

    job_id: str
    attempt: int
    reason: str


@dataclass(frozen=True)
class Reachable:
    """The attempt can be asked after again, and there is no other news of it."""

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
    """What there is to run on. CPU in thousandths of a core, memory in bytes, GPUs counted."""

    cpu_m: int
    mem: int
    gpu: int

    def __add__(self, other: Capacity) -> Capacity:
        return Capacity(self.cpu_m + other.cpu_m, self.mem + other.mem, self.gpu + other.gpu)

    def __sub__(self, other: Capacity) -> Capacity:
        return Capacity(self.cpu_m - other.cpu_m, self.mem - other.mem, self.gpu - other.gpu)

    def least(self, other: Capacity) -> Capacity:
        """The smaller of each."""
        return Capacity(
            min(self.cpu_m, other.cpu_m), min(self.mem, other.mem), min(self.gpu, other.gpu)
        )

    def most(self, other: Capacity) -> Capacity:
        """The larger of each."""
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
    """How each job has the project to itself: "overlay" or "copy"."""
    builds_environments: bool = False
    """Whether it builds the environments of versions, on the machines where workers run."""


@dataclass(frozen=True)
class NodeInfo:
    """One machine that jobs run on."""

    name: str
    is_ready: bool
    total: Capacity
    free: Capacity
    problem: str | None = None
    """Why it is not ready."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What `compute.node_labels` selects by."""


class Engine(Protocol):
    """An engine. All methods are called on the event loop and do not block it.

    `report` may be called at any time on the loop, also before `start` returns. Exactly one of
    Ended, Lost and NeverStarted is reported for each attempt that was started or recovered.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    async def open(self, report: Report) -> None:
        """Get ready.

        Raises:
            StartupError: this machine lacks what the engine needs; the message says what.
        """

    async def close(self) -> None:
        """Let go of everything but the jobs: their workers go on."""

    def refusal(self, compute: Compute) -> str | None:
        """Why this could never run here ("needs 8 GPUs, this machine has 1"), or None."""

    def reserve(self, job_id: str, compute: Compute) -> str | None:
        """Take capacity for a job until its attempt's end is reported; or say what it waits for
        ("needs 32 GiB, 31 GiB free") and take nothing."""

    def release(self, job_id: str) -> None:
        """Give back what `reserve` took and undo what `prepare` did, for a job that is not going to be
        started after all."""

    def claim(self, job_id: str, attempt: int) -> str:
        """A versioned opaque handle for an attempt about to start: all that `recover` needs.

        Raises:
            OSError: the engine's storage takes nothing now.
        """

    def prepare(self, attempt: Attempt) -> None:
        """A hint: the attempt was claimed, and is started once the store holds that. Whatever can be done
        before, while the store writes, may be; nothing of it shows if `release` is called instead."""

    def start(self, attempt: Attempt) -> None:
        """Start the attempt's worker; what comes of it is reported, failures included."""

    def stop(self, job_id: str) -> None:
        """End an attempt that was started or recovered: SIGTERM, a grace period, SIGKILL, to the
        whole tree. What comes of it is reported. Harmless for one that has ended."""

    async def recover(self, attempt: Attempt) -> None:
        """Take up an attempt that an earlier operator claimed; what became of it is reported. Its
        capacity counts as taken at once."""

    def warm(self, version: Version) -> None:
        """A hint: jobs of this version are likely to come."""

    def forget(self, *, versions: Sequence[str] = (), jobs: Sequence[str] = ()) -> None:
        """A hint: no job of these versions will come, and the data of these jobs is no longer needed.
        Delete what the engine keeps of them elsewhere; the caller deletes the job folders on the
        operator's machine (`joblog.JobFolders`).

        Call it at any time while the engine is open, for jobs whose end was reported. A second call
        has no effect. An engine need not store the hint: what it could not delete, as on a machine
        that was out of reach, may stay there.

        Args:
            versions: the ids of versions.
            jobs: the ids of jobs.
        """

    def nodes(self) -> list[NodeInfo]:
        """The machines that there are now, and what is free on each."""
