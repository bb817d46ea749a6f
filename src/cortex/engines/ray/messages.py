"""The messages between the Ray engine, the driver and the agents: plain data, which is pickled.
`encoding` lists those that agents answer with.

All of them must run the same version of this package, and of these messages. The operator compares
`Hello.version` with `AGENT_VERSION`, and replaces an agent that has another; such an agent must
still be able to read and write the messages up to that point.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cortex
from cortex.engines.base import NOTHING, Capacity, Observation
from cortex.spec.api import ApiSpec
from cortex.spec.job import JobSpec

AGENT_VERSION = f"{cortex.__version__}/4"
"""The version of this package, and of the messages here: a change of them adds one."""
PIECE_BYTES = 64 << 10
"""The size of the pieces in which projects and checkpoints travel: other messages must not wait for
long."""


@dataclass(frozen=True)
class Drain:
    """A node that is being drained: it accepts no reservation, and is about to leave."""

    left_s: float | None
    """The seconds until its platform ends it; None without a deadline."""


@dataclass(frozen=True)
class NodeState:
    """A node, by Ray's figures."""

    node_id: str
    name: str
    is_alive: bool
    total: Capacity
    taken: Capacity
    """Taken by this operator's jobs and by others."""
    labels: dict[str, str] = field(default_factory=dict)
    drain: Drain | None = None
    """None where the node is not being drained."""
    death: str = ""
    """Why the node has left, where its platform ended it on purpose."""


class Refusal(Exception):
    """An agent refuses a request for good; the message says why."""


@dataclass(frozen=True)
class Wanted:
    """The capacity that a waiting job needs on one node, and that no node can give it now."""

    amount: Capacity
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """The values that the node may have for each of these labels."""


@dataclass(frozen=True)
class Hello:
    """An agent's answer to an operator that begins a session."""

    version: str
    incarnation: str
    """Identifies the session. The agent's process keeps its observations from here on until the
    operator has received them."""
    root: str
    """Identifies the node's folder. A new folder, without the earlier records, has another."""
    local_handle: str
    memory_limit: str
    own_folder: str
    seq: int
    host: str = ""
    """The address of the node, where the agent accepts the operator's connection."""
    port: int = 0
    key: bytes = field(default=b"", repr=False)
    """Authenticates both ends of the connection. Each process of an agent has another."""


@dataclass(frozen=True)
class Builds:
    """The limits of the builds of environments on nodes."""

    timeout_s: float = 1800
    variables: frozenset[str] = frozenset()
    """Names of variables of the node that builds inherit, beside the usual ones."""


DEFAULT_BUILDS = Builds()


@dataclass(frozen=True)
class Checkpoint:
    """An archive (tar.gz) of what lay in a job's `$CORTEX_JOB_DIR/checkpoint` at one moment."""

    job_id: str
    attempt: int
    """The attempt that had these files."""
    size: int
    digest: str
    """SHA-256 of the archive, in hexadecimal."""


@dataclass(frozen=True)
class NodeOrder:
    """The order to a node to start or recover an attempt."""

    spec: JobSpec
    api: ApiSpec
    env: dict[str, str]
    number: int
    root: str
    local_handle: str
    grace_s: float
    left_s: float | None
    """The seconds until the deadline: the clocks of two machines cannot be compared."""
    losses: int = 0
    lost: str | None = None
    locks: dict[str, str] = field(default_factory=dict)
    """The lock files of the project, by name."""
    builds: Builds = DEFAULT_BUILDS
    checkpoint: Checkpoint | None = None
    """The last checkpoint of an earlier attempt, for the new one."""


@dataclass(frozen=True)
class Lock:
    """A lock file that a node has made from the environment that it built."""

    project_id: str
    name: str
    text: str


@dataclass(frozen=True)
class LogPiece:
    """Bytes of a job's log from an offset on, and the `log.cut` record, if it is plausible."""

    offset: int
    data: bytes
    end: int
    """The offset of the next piece. It is beyond the data where a gap follows."""
    cut: bytes | None


@dataclass(frozen=True)
class Poll:
    """The observations of an agent since the last poll, and the new pieces of logs."""

    incarnation: str
    seq: int
    seen: tuple[Observation | Lock | Checkpoint, ...]
    logs: dict[str, LogPiece] = field(default_factory=dict)
    rests: dict[str, LogPiece] = field(default_factory=dict)
    """The last pieces of the logs of jobs whose end is in `seen`, where one piece is left."""
    held: Capacity = NOTHING
    """What Ray has reserved on the node for this operator's jobs."""
    problem: str | None = None
    """Why the node can take no new job."""
