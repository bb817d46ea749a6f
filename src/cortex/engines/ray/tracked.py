"""One attempt that the Ray engine drives, from its start or recovery until its end is reported."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from cortex.engines.base import Attempt, Lost, NeverStarted, Reachable, Unreachable
from cortex.engines.ray.messages import DEFAULT_BUILDS, Builds, Hello, NodeOrder, Reservation
from cortex.engines.ray.placement import Node
from cortex.spec.api import MILLI

HANDLE_VERSION = 1


@dataclass
class TrackedAttempt:
    """What is known of it; the handle tells where it is."""

    attempt: Attempt
    node_id: str
    root: str
    local_handle: str
    base: int
    """Where its log begins in the operator's copy."""
    sent: bool = False
    """Whether its node may know of it."""
    stop: bool = False
    started: bool = False
    unreachable: bool = False
    ending: bool = False
    copied: bool = True
    """Whether its log is; one that is larger than any file here cannot be."""

    @property
    def job_id(self) -> str:
        return self.attempt.spec.job_id

    @property
    def number(self) -> int:
        return self.attempt.number

    @property
    def left_s(self) -> float | None:
        """Until its deadline, if it has one."""
        deadline = self.attempt.deadline
        return None if deadline is None else deadline - time.monotonic()

    def seat(self, namespace: str) -> Reservation:
        compute = self.attempt.version.api.compute
        bundle: dict[str, float] = {"CPU": compute.cpu_m / MILLI}
        if compute.mem:
            bundle["memory"] = compute.mem
        if compute.gpu:
            bundle["GPU"] = compute.gpu
        return Reservation(f"{namespace}:{self.job_id}:{self.number}", self.node_id, bundle)

    def order(
        self,
        namespace: str,
        grace_s: float,
        gpus: tuple[int, ...] = (),
        locks: dict[str, str] | None = None,
        builds: Builds = DEFAULT_BUILDS,
    ) -> NodeOrder:
        """It, as its node is told of it now."""
        attempt = self.attempt
        return NodeOrder(
            spec=attempt.spec,
            api=attempt.version.api,
            env=dict(attempt.version.env),
            number=attempt.number,
            root=self.root,
            local_handle=self.local_handle,
            grace_s=grace_s,
            left_s=self.left_s,
            seat=self.seat(namespace).name,
            gpus=gpus,
            losses=attempt.losses,
            lost=attempt.lost,
            locks=locks or {},
            builds=builds,
        )

    def lost(self, reason: str) -> Lost:
        return Lost(self.job_id, self.number, reason)

    def never(self, held_up_by: str | None = None) -> NeverStarted:
        return NeverStarted(self.job_id, self.number, held_up_by)

    def reachable(self) -> Reachable:
        return Reachable(self.job_id, self.number)

    def out_of_reach(self, reason: str) -> Unreachable:
        return Unreachable(self.job_id, self.number, reason)


def handle(node: Node | None, hello: Hello | None, base: int) -> str:
    return json.dumps(
        {
            "v": HANDLE_VERSION,
            "node": "" if node is None else node.node_id,
            "root": "" if hello is None else hello.root,
            "local": "" if hello is None else hello.local_handle,
            "log": base,
        }
    )


def taken_up(attempt: Attempt) -> TrackedAttempt:
    told = json.loads(attempt.handle)
    return TrackedAttempt(attempt, told["node"], told["root"], told["local"], told["log"])
