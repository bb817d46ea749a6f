"""What the Ray engine, its link to the cluster and the agents on the nodes tell one another. Plain data
that is pickled; all of them are of the same version of this package, which the agents check.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cortex.engines.base import Capacity, Observation
from cortex.spec.api import ApiSpec
from cortex.spec.job import JobSpec


@dataclass(frozen=True)
class NodeState:
    """A node as Ray knows it."""

    node_id: str
    name: str
    is_alive: bool
    total: Capacity
    taken: Capacity
    """By whomever: jobs of this operator, and others."""
    labels: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An agent does not do what it was asked, and never will; the message says why."""


@dataclass(frozen=True)
class Reservation:
    """What Ray holds for an attempt while it runs: a placement group of one bundle on one node."""

    name: str
    node_id: str
    bundle: dict[str, float]


@dataclass(frozen=True)
class Hello:
    """What an agent says of itself when it is asked first."""

    version: str
    incarnation: str
    """Another for each hello: what the agent sees from then on is kept until whoever said it has it, or
    the agent's process is gone."""
    root: str
    """Another when the node's folder, and the records in it, are not those that were there before."""
    local_handle: str
    memory_limit: str
    own_folder: str
    seq: int


@dataclass(frozen=True)
class Builds:
    """What nodes let builds of environments do."""

    timeout_s: float = 1800
    variables: frozenset[str] = frozenset()
    """Names of those of a node that builds find beside the ones that all do."""


DEFAULT_BUILDS = Builds()


@dataclass(frozen=True)
class NodeOrder:
    """An attempt, as a node is told of it."""

    spec: JobSpec
    api: ApiSpec
    env: dict[str, str]
    number: int
    root: str
    local_handle: str
    grace_s: float
    left_s: float | None
    """Until its deadline: no two machines' clocks can be compared."""
    seat: str
    gpus: tuple[int, ...] = ()
    losses: int = 0
    lost: str | None = None
    locks: dict[str, str] = field(default_factory=dict)
    """The lock files of its project, by their names."""
    builds: Builds = DEFAULT_BUILDS


@dataclass(frozen=True)
class Lock:
    """A lock file that a node has made of what it built."""

    project_id: str
    name: str
    text: str


@dataclass(frozen=True)
class LogPiece:
    """Bytes of a job's log from an offset on, and its `log.cut`, if there is one that can be true."""

    offset: int
    data: bytes
    end: int
    """The offset to ask for next: beyond the data where a part was cut out of the file."""
    cut: bytes | None


@dataclass(frozen=True)
class Poll:
    """What has happened on a node since it was asked before."""

    incarnation: str
    seq: int
    seen: tuple[Observation | Lock, ...]
    logs: dict[str, LogPiece] = field(default_factory=dict)
