"""The state of one attempt, from its start or recovery until the engine has reported its end."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

from cortex.engines.base import Attempt, Lost, NeverStarted, Reachable, Unreachable, Waits
from cortex.engines.ray.messages import DEFAULT_BUILDS, Builds, Checkpoint, Hello, NodeOrder
from cortex.engines.ray.placement import Node

HANDLE_VERSION = 1


@dataclass
class TrackedAttempt:
    """An attempt, its node (which the handle names), and the operator's knowledge of its state."""

    attempt: Attempt
    node_id: str
    node_name: str
    """The name by which users know the node; empty in a handle of an earlier version."""
    root: str
    local_handle: str
    log_base: int
    """The offset in the operator's copy of the job's log at which the attempt's own log begins."""
    is_sent: bool = False
    """Whether the order may have reached the node."""
    stop_requested: bool = False
    is_drained: bool = False
    """Whether the operator has ordered its stop because its node is being drained."""
    has_started: bool = False
    is_unreachable: bool = False
    is_ending: bool = False
    """Whether the node has reported the end; the rest of the log may still have to be copied."""
    is_log_copied: bool = True
    """Whether the log is copied. A log that exceeds the largest file on this machine is not."""
    write: asyncio.Future[list[tuple[TrackedAttempt, Exception]]] | None = None
    """The last write to the copy, which a thread ends even where nothing waits for it."""

    @classmethod
    def of(cls, attempt: Attempt) -> TrackedAttempt:
        """Track an attempt; its handle says where it runs."""
        content = json.loads(attempt.handle)
        return cls(
            attempt,
            content["node"],
            content.get("name", ""),
            content["root"],
            content["local"],
            content["log"],
        )

    @property
    def job_id(self) -> str:
        return self.attempt.spec.job_id

    @property
    def number(self) -> int:
        return self.attempt.number

    @property
    def remaining_s(self) -> float | None:
        """The seconds until the deadline; None without a deadline."""
        deadline = self.attempt.deadline
        return None if deadline is None else deadline - time.monotonic()

    def node_order(
        self,
        grace_s: float,
        locks: dict[str, str] | None = None,
        builds: Builds = DEFAULT_BUILDS,
        checkpoint: Checkpoint | None = None,
    ) -> NodeOrder:
        """The order to the node, with the time that remains at this moment."""
        attempt = self.attempt
        return NodeOrder(
            spec=attempt.spec,
            api=attempt.version.api,
            env=dict(attempt.version.env),
            number=attempt.number,
            root=self.root,
            local_handle=self.local_handle,
            grace_s=grace_s,
            left_s=self.remaining_s,
            losses=attempt.losses,
            lost=attempt.lost,
            locks=locks or {},
            builds=builds,
            checkpoint=checkpoint,
        )

    @property
    def left(self) -> str:
        """The reason of a loss whose node is not among the nodes of the cluster."""
        return f"its node {self.node_name} ".rstrip() + " is no longer in the cluster"

    def lost(self, reason: str) -> Lost:
        return Lost(self.job_id, self.number, reason)

    def never_started(self, blocked_by: str | None = None) -> NeverStarted:
        return NeverStarted(self.job_id, self.number, blocked_by)

    def waits(self, reason: str) -> Waits:
        return Waits(self.job_id, self.number, reason)

    def reachable(self) -> Reachable:
        return Reachable(self.job_id, self.number)

    def unreachable(self, reason: str) -> Unreachable:
        return Unreachable(self.job_id, self.number, reason)


def handle(node: Node | None, hello: Hello | None, log_base: int) -> str:
    """The handle of an attempt on a node, as `Engine.claim` returns it."""
    return json.dumps(
        {
            "v": HANDLE_VERSION,
            "node": "" if node is None else node.node_id,
            "name": "" if node is None else node.name,
            "root": "" if hello is None else hello.root,
            "local": "" if hello is None else hello.local_handle,
            "log": log_base,
        }
    )
