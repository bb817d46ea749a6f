"""The engine protocol: all that the operator knows of where workers run.

An engine starts, stops, recovers and cleans attempts of jobs, and reports what it observes. It never
writes a status: the dispatcher turns observations into events of the life cycle. Every engine passes
`tests/engines`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from cortex.spec.api import ApiSpec, Compute
from cortex.spec.job import JobSpec


@dataclass(frozen=True)
class Version:
    """A deployed version on this machine: what a worker of it needs."""

    api: ApiSpec
    project: Path
    python: Path
    """The interpreter of its environment."""
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


class Ending(StrEnum):
    """Why a worker's run is over."""

    EXITED = "exited"  # by itself: see exit_code
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    STOPPED = "stopped"  # somebody asked the supervisor to stop it


@dataclass(frozen=True)
class Started:
    """The attempt's worker has started."""

    job_id: str
    attempt: int
    start_ns: int


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


@dataclass(frozen=True)
class Lost:
    """The platform failed the attempt; no process of it is left."""

    job_id: str
    attempt: int
    reason: str


@dataclass(frozen=True)
class NeverStarted:
    """The attempt was fenced off before any code of the job ran, and never will run."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class Unreachable:
    """The attempt cannot be asked after right now; another observation follows when it can."""

    job_id: str
    attempt: int
    reason: str


@dataclass(frozen=True)
class CapacityFreed:
    """A job that did not fit before may fit now."""


Observation = Started | Ended | Lost | NeverStarted | Unreachable | CapacityFreed
Report = Callable[[Observation], None]


@dataclass(frozen=True)
class Capacity:
    """What there is to run on. CPU in thousandths of a core, memory in bytes, GPUs counted."""

    cpu_m: int
    mem: int
    gpu: int


@dataclass(frozen=True)
class Capabilities:
    """What an engine is and can do, as data (`/-/info` shows it)."""

    name: str
    total: Capacity
    memory_limit: str
    """How `compute.mem` is enforced: "cgroup v2", "cgroup v1" or "watchdog"."""


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
        """Give back what `reserve` took, for a job that is not going to be started after all."""

    def claim(self, job_id: str, attempt: int) -> str:
        """A versioned opaque handle for an attempt about to start: all that `recover` needs."""

    async def start(self, attempt: Attempt) -> None:
        """Start the attempt's worker; what comes of it is reported, failures included."""

    def stop(self, job_id: str) -> None:
        """End an attempt that was started or recovered: SIGTERM, a grace period, SIGKILL, to the
        whole tree. What comes of it is reported. Harmless for one that has ended."""

    async def recover(self, attempt: Attempt) -> None:
        """Take up an attempt that an earlier operator claimed; what became of it is reported. Its
        capacity counts as taken at once."""

    def warm(self, version: Version) -> None:
        """A hint: jobs of this version are likely to come."""

    def forget(self, api_id: str) -> None:
        """A hint: no more jobs of this version will come."""

    def log(self, job_id: str) -> Path:
        """The file of the job's log; it may not exist yet."""

    def note(self, job_id: str, text: str) -> None:
        """Append the platform's own words to the job's log, for a job that never got a worker."""
