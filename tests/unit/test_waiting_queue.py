"""The waiting queue, compared with a plain list that is scanned in order, on the ledger of a cluster
and on that of one machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cortex.engines.base import NOTHING, Capacity
from cortex.engines.capacity import Hold, capacity_of, fits, selects
from cortex.engines.local.machine import MachineLedger
from cortex.engines.ray.messages import NodeState
from cortex.engines.ray.placement import Placement
from cortex.operator.dispatch.line import Decision, Refuse, Start, WaitingQueue
from cortex.spec.api import Compute

APIS = ("a", "b", "c")
ZONES = [{}, {}, {"zone": ("a",)}, {"zone": ("b",)}, {"zone": ("a", "b")}]
BEHIND = "waits behind earlier jobs, the first of which "


@dataclass(frozen=True, order=True)
class Job:
    """A waiting job."""

    seq: int
    job_id: str
    api: str
    compute: Compute = field(compare=False)


@dataclass
class PlainNode:
    """A node, and the jobs that run on it."""

    total: Capacity
    labels: dict[str, str]
    is_ready: bool = True
    jobs: dict[str, Capacity] = field(default_factory=dict)

    @property
    def free(self) -> Capacity:
        return self.total - sum(self.jobs.values(), NOTHING)


class PlainList:
    """The rule, without lanes, indexes and short cuts."""

    def __init__(self) -> None:
        self.nodes: dict[int, PlainNode] = {}
        self.ever: set[tuple[Capacity, tuple[tuple[str, str], ...]]] = set()
        self.waiting: list[Job] = []
        self.limits: dict[str, int] = {}
        self.api_of: dict[str, str] = {}  # of running jobs

    def add_node(self, number: int, total: Capacity, labels: dict[str, str]) -> None:
        self.nodes[number] = PlainNode(total, labels)
        self.ever.add((total, tuple(labels.items())))

    def selected(self, compute: Compute) -> dict[int, PlainNode]:
        return {
            number: node
            for number, node in self.nodes.items()
            if node.is_ready and selects(compute.node_labels, node.labels)
        }

    def is_refused(self, compute: Compute) -> bool:
        return not any(
            fits(compute, total) and selects(compute.node_labels, dict(labels))
            for total, labels in self.ever
        )

    def could_run(self, compute: Compute) -> bool:
        return any(fits(compute, node.total) for node in self.selected(compute).values())

    def is_at_limit(self, api: str, heads: int = 0) -> bool:
        running = sum(each == api for each in self.api_of.values())
        return api in self.limits and running + heads >= self.limits[api]

    def place(self, compute: Compute, holds: list[Hold]) -> int | None:
        """The node for a job beside these holds."""
        found = []
        for number, node in self.selected(compute).items():
            held = sum((hold.amount for hold in holds if hold.node == number), NOTHING)
            if fits(compute, (node.free - held).maximum(NOTHING)):
                found.append((node.total.gpu > 0, -node.free.cpu_m, number))
        return min(found)[2] if found else None

    def start(self, job: Job, node: int) -> None:
        self.nodes[node].jobs[job.job_id] = capacity_of(job.compute)
        self.api_of[job.job_id] = job.api

    def end(self, job_id: str) -> None:
        for node in self.nodes.values():
            node.jobs.pop(job_id, None)
        del self.api_of[job_id]

    def schedule(self, holds: list[Hold]) -> list[Decision]:
        """Scan all waiting jobs.

        Args:
            holds: where heads hold capacity. A head without a hold is one that no later job could
                harm.
        """
        decisions: list[Decision] = []
        before: list[Hold] = []
        selections: list[dict[str, tuple[str, ...]]] = []
        heads: Counter[str] = Counter()
        for job in sorted(self.waiting):
            if self.is_at_limit(job.api, heads[job.api]):
                continue
            if self.is_refused(job.compute):
                decisions.append(Refuse(job.job_id, ""))
                self.waiting.remove(job)
                continue
            if not self.could_run(job.compute):
                continue
            node = self.place(job.compute, before)
            if node is not None:
                decisions.append(Start(job.job_id))
                self.waiting.remove(job)
                self.start(job, node)
            elif job.compute.node_labels not in selections:
                selections.append(job.compute.node_labels)
                heads[job.api] += 1
                before += [hold for hold in holds if hold.job_id == job.job_id]
        return decisions


class Model(RuleBasedStateMachine):
    """Clients submit and withdraw jobs, which start and end; limits change; nodes come and go."""

    is_cluster = True

    def __init__(self) -> None:
        super().__init__()
        self.plain = PlainList()
        self.jobs: dict[str, Job] = {}
        self.submitted = 0
        self.states: dict[str, NodeState] = {}
        self.placement = Placement()
        self.machine = MachineLedger(Capacity(4, 4, 2))
        self.ledger = self.placement if self.is_cluster else self.machine
        self.queue = WaitingQueue(self.ledger, lambda job_id: job_id in self.jobs)
        self.seq_of: dict[str, int] = {}
        self.front: tuple[str, set[str]] | None = None
        if self.is_cluster:
            self.join(cpu=2, mem=2, gpu=0, zone="a")
            self.join(cpu=4, mem=4, gpu=1, zone="a")
        else:
            self.plain.add_node(0, self.machine.total, {})

    # What happens

    @rule(
        api=st.sampled_from(APIS),
        later=st.sampled_from([0, 0, 0, 1, 3]),
        cpu=st.integers(1, 4),
        mem=st.sampled_from([None, None, 1, 3]),
        gpu=st.sampled_from([0, 0, 0, 1, 2]),
        labels=st.sampled_from(ZONES),
    )
    def submit(
        self,
        api: str,
        later: int,
        cpu: int,
        mem: int | None,
        gpu: int,
        labels: dict[str, tuple[str, ...]],
    ) -> None:
        compute = Compute(cpu_m=cpu, mem=mem, gpu=gpu, node_labels=labels)
        self.submitted += 1
        # A job whose environment took long to build joins after jobs with a higher number.
        job = Job(self.submitted * 4 - later * 5, f"{self.submitted}", api, compute)
        self.seq_of[job.job_id] = job.seq
        if not later and self.queue.try_claim(job.job_id, api, compute):
            self.assert_order_of(job)
            node = self.plain.place(compute, list(self.queue._holds))
            assert node is not None
            self.plain.start(job, node)
            return
        self.jobs[job.job_id] = job
        self.plain.waiting.append(job)
        was_stale = self.is_stale
        if self.queue.push(job.seq, job.job_id, api, compute):
            self.schedule()
        if not later and not was_stale:
            assert job.job_id not in self.plain.api_of, "a job that could start was not claimed"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        """A waiting job is stopped."""
        job = self.jobs.pop(data.draw(st.sampled_from(sorted(self.jobs))))
        self.plain.waiting.remove(job)
        if self.queue.remove(job.job_id, job.api, job.compute):
            self.schedule()

    @precondition(lambda self: self.plain.api_of)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.end_job(data.draw(st.sampled_from(sorted(self.plain.api_of))))
        self.schedule()

    def end_job(self, job_id: str) -> None:
        api = self.plain.api_of[job_id]
        self.plain.end(job_id)
        assert self.ledger.remove_reservation(job_id) or self.is_cluster
        assert self.queue.release(api, job_id)
        assert not self.queue.release(api, job_id)

    @rule(api=st.sampled_from(APIS[1:]), limit=st.sampled_from([None, 1, 2]))
    def limit(self, api: str, limit: int | None) -> None:
        self.queue.limit(api, limit)
        if limit is None:
            self.plain.limits.pop(api, None)
        else:
            self.plain.limits[api] = limit
        self.front = None
        self.schedule()

    @precondition(lambda self: self.is_cluster and len(self.states) < 4)
    @rule(
        cpu=st.integers(1, 4),
        mem=st.integers(1, 4),
        gpu=st.sampled_from([0, 0, 1, 2]),
        zone=st.sampled_from("abc"),
    )
    def join(self, cpu: int, mem: int, gpu: int, zone: str) -> None:
        number = len(self.plain.ever) if not self.plain.nodes else max(self.numbers.values()) + 1
        name, total = f"node {number}", Capacity(cpu, mem, gpu)
        self.states[name] = NodeState(name, name, True, total, NOTHING, {"zone": zone})
        self.placement.update(tuple(self.states.values()))
        node = self.placement.alive[name]
        node.is_ready = True
        self.plain.add_node(node.number, total, {"zone": zone})
        self.schedule()

    @property
    def numbers(self) -> dict[str, int]:
        return {name: node.number for name, node in self.placement.alive.items()}

    @precondition(lambda self: len(self.states) > 1)
    @rule(data=st.data())
    def lose_node(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.states)))
        number = self.numbers[name]
        del self.states[name]
        self.placement.update(tuple(self.states.values()))
        for job_id in list(self.plain.nodes[number].jobs):
            self.end_job(job_id)
        del self.plain.nodes[number]
        self.front = None
        self.schedule()

    is_stale = False
    """Whether a node has stopped to answer since the queue decided: no event reports that."""

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def lose_contact(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.states)))
        self.placement.alive[name].is_ready = False
        self.plain.nodes[self.numbers[name]].is_ready = False
        self.front, self.is_stale = None, True

    @precondition(lambda self: not all(node.is_ready for node in self.plain.nodes.values()))
    @rule()
    def regain_contact(self) -> None:
        for name, number in self.numbers.items():
            self.placement.alive[name].is_ready = self.plain.nodes[number].is_ready = True
        self.schedule()

    # What must hold

    def schedule(self) -> None:
        kept = {hold.job_id: hold for hold in self.queue._holds}
        decisions = self.queue.schedule()
        holds = list(self.queue._holds)
        for decision in decisions:
            job = self.jobs.pop(decision.job_id)
            if isinstance(decision, Start):
                self.assert_order_of(job)
        plain = self.plain.schedule(holds)
        assert [(type(each), each.job_id) for each in decisions] == [
            (type(each), each.job_id) for each in plain
        ]
        self.is_stale = False
        self.assert_places()
        for hold in holds:
            self.assert_hold(hold, kept.get(hold.job_id))
        for job in self.plain.waiting:
            self.assert_message(job)
        self.assert_front()

    def assert_places(self) -> None:
        """Each job runs where the plain list has it, and nothing else is reserved."""
        if self.is_cluster:
            for name, number in self.numbers.items():
                node = self.plain.nodes[number]
                assert self.placement.alive[name].free == node.free
                for job_id in node.jobs:
                    found = self.placement.node_of(job_id)
                    assert found is not None
                    assert found.node_id == name
        else:
            assert self.machine.free == self.plain.nodes[0].free

    def assert_order_of(self, job: Job) -> None:
        """No job starts before an earlier one of the same selection that needs the same."""
        for other in self.jobs.values():
            if other.api not in self.plain.limits and other.compute == job.compute:
                assert other > job

    def assert_hold(self, hold: Hold, kept: Hold | None) -> None:
        """A head waits for a node that can run it, and for the same as long as that can."""
        job, node = self.jobs[hold.job_id], self.plain.nodes[hold.node]
        assert hold.amount == capacity_of(job.compute)
        assert node in self.plain.selected(job.compute).values()
        assert fits(job.compute, node.total)
        if kept is not None and kept.node != hold.node:
            before = self.plain.nodes.get(kept.node)
            assert before is None or not before.is_ready

    def assert_front(self) -> None:
        """The first job that could run does not fit, whatever waits for absent nodes. It starts once
        all jobs have ended that ran when it became the first, and earlier ones: whatever later jobs
        start meanwhile."""
        could_run = [
            job
            for job in sorted(self.plain.waiting)
            if self.plain.could_run(job.compute) and not self.plain.is_at_limit(job.api)
        ]
        if not could_run:
            self.front = None
            return
        first = could_run[0]
        assert self.plain.place(first.compute, []) is None
        if self.front is None or self.front[0] != first.job_id:
            self.front = first.job_id, set(self.plain.api_of)
        assert any(
            job_id in self.front[1] or self.seq_of[job_id] < first.seq
            for job_id in self.plain.api_of
        ), "a job starves"

    def assert_message(self, job: Job) -> None:
        """A job waits behind others only if it would start without them, or would start after them
        in any case."""
        message = self.queue.why(job.job_id, job.api, job.compute)
        running = self.plain.is_at_limit(job.api)
        assert (message or "").endswith("its limits.max_running") == running
        assert message is not None
        if running:
            return
        earlier = [other for other in self.plain.waiting if other < job]
        if message.startswith(BEHIND):
            lacks = {self.ledger.lacks(other.compute) for other in earlier}
            assert message.removeprefix(BEHIND) in lacks
            assert (
                self.plain.place(job.compute, []) is not None
                or job.api in self.plain.limits
                or any(self.precedes(other.compute, job.compute) for other in earlier)
            )
        else:
            assert message == self.ledger.lacks(job.compute)

    def precedes(self, other: Compute, compute: Compute) -> bool:
        wanted = capacity_of(compute)
        return (
            other.node_labels == compute.node_labels
            and capacity_of(other).maximum(wanted) == wanted
        )


class MachineModel(Model):
    is_cluster = False


@pytest.mark.parametrize("model", [Model, MachineModel])
def test_the_queue_decides_as_a_plain_list_that_is_scanned_in_order(model: type[Model]) -> None:
    run_state_machine_as_test(
        model, settings=settings(max_examples=100, stateful_step_count=40, deadline=None)
    )


def test_the_demand_is_that_of_the_first_jobs_within_the_limits_of_their_apis() -> None:
    ended: set[str] = set()
    queue = WaitingQueue(Placement(), lambda job_id: job_id not in ended)
    queue.limit("a", 2)
    queue.admit("a", "running")
    small, large = Compute(cpu_m=1000), Compute(cpu_m=2000)
    for number, (api, compute) in enumerate(
        [("b", small), ("a", large), ("a", small), ("b", large), ("a", small)]
    ):
        queue.push(number, str(number), api, compute)
    assert queue.first(10) == [small, large, large]
    assert queue.first(2) == [small, large]
    queue.release("a", "running")
    assert queue.first(10) == [small, large, small, large]
    ended.add("1")
    assert queue.first(10) == [small, small, large, small]
