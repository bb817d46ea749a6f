"""The engine protocol on a Ray cluster. Called by the dispatcher and by `tests/engines`.

Each node has an agent, a detached actor that runs the local engine: records, limits, stop and
recovery are those of one machine. It also reserves in Ray what its jobs take. The operator's side
chooses nodes (`placement`), and follows each attempt through the agents (`attempts`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from cortex.engines.base import Attempt, Capabilities, Report, Version
from cortex.engines.ray.attempts import Attempts
from cortex.engines.ray.calls import AgentCalls, Locks
from cortex.engines.ray.checkpoints import CheckpointCopies, CheckpointStore
from cortex.engines.ray.cluster import Cluster
from cortex.engines.ray.link import Refused
from cortex.engines.ray.log_copies import LogCopies
from cortex.engines.ray.messages import DEFAULT_BUILDS, Builds
from cortex.engines.ray.placement import Placement
from cortex.engines.ray.tracked import handle
from cortex.engines.ray.transfers import Transfers
from cortex.errors import StartupError
from cortex.joblog.folders import JobFolders
from cortex.spec.api import Compute


class RayEngine:
    """Runs jobs on the nodes of a cluster. The operator's copies of their logs are below `root`."""

    def __init__(
        self,
        root: Path,
        address: str,
        namespace: str,
        grace_s: float = 10.0,
        node_dir: str | None = None,
        locks: Locks | None = None,
        builds: Builds = DEFAULT_BUILDS,
        checkpoints: CheckpointStore | None = None,
        *,
        has_autoscaler: bool = False,
    ) -> None:
        """
        Args:
            grace_s: the seconds between SIGTERM and SIGKILL.
            node_dir: the folder on nodes for projects, environments and jobs.
            has_autoscaler: whether the cluster adds nodes that jobs need, and removes idle nodes.
        """
        self._folders = JobFolders(root)
        self._copies = LogCopies(self._folders)
        self._address = address
        self.ledger = Placement(self._report_freed, has_autoscaler=has_autoscaler)
        self._cluster = Cluster(
            address, namespace, node_dir, self.ledger, has_autoscaler=has_autoscaler
        )
        orders = AgentCalls(self._cluster, grace_s, locks, builds)
        transfers = Transfers(self._cluster, root)
        copies = CheckpointCopies(self._cluster, checkpoints, root)
        self._attempts = Attempts(self._cluster, orders, transfers, self._copies, copies)

    @property
    def capabilities(self) -> Capabilities:
        hellos = self._cluster.hellos.values()
        limits = _of_all(hello.memory_limit for hello in hellos)
        folders = _of_all(hello.own_folder for hello in hellos)
        return Capabilities(
            "ray",
            self.ledger.total,
            limits,
            folders,
            builds_environments=True,
            # A head that replaces a lost one has no nodes at first.
            may_grow=not (self._cluster.is_joined and self.ledger.alive),
            problem=self._cluster.problem,
        )

    async def open(self, report: Report) -> None:
        if importlib.util.find_spec("ray") is None:
            raise StartupError(
                "the Ray engine needs Ray, which is not installed: pip install 'cortex-tasks[ray]'"
            )
        try:
            self._folders.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(
                f"the data folder {self._folders.root} cannot be written: {error}; "
                "choose another one"
            ) from error
        try:
            self._attempts.open(report)
            await self._cluster.open(self._attempts)
        except Refused as error:
            raise StartupError(
                f"the Ray cluster at {self._address} cannot be joined: {error}"
            ) from error

    async def close(self) -> None:
        await self._attempts.close()
        await self._cluster.close()

    def claim(self, job_id: str, attempt: int) -> str:
        node = self.ledger.node_of(job_id)
        hello = None if node is None else self._cluster.hellos.get(node.node_id)
        return handle(node, hello, self._copies.begin(job_id, attempt))

    def prepare(self, attempt: Attempt) -> None:
        """Does nothing: the message to the node takes longest, and must not precede the commit."""

    def start(self, attempt: Attempt) -> None:
        self._attempts.start(attempt)

    def stop(self, job_id: str) -> None:
        self._attempts.stop(job_id)

    def demand(self, waiting: Sequence[Compute]) -> None:
        self._cluster.waiting = waiting

    async def recover(self, attempt: Attempt) -> None:
        self._attempts.recover(attempt)

    def warm(self, version: Version) -> None:
        """Does nothing: the node is chosen with the job."""

    def forget(self, *, versions: Sequence[str] = (), jobs: Sequence[str] = ()) -> None:
        """See `Engine.forget`. The nodes that answer now delete the folders of these jobs."""
        for api_id in versions:
            self._attempts.hint_to_all("forget", api_id)
        if jobs:
            self._attempts.hint_to_all("discard", list(jobs))

    def _report_freed(self) -> None:
        self._attempts.report_freed()


def _of_all(methods: Iterable[str]) -> str:
    """The methods of all nodes whose agents have answered, each once."""
    return ", ".join(sorted(set(methods))) or "each node's own"
