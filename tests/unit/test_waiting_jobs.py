"""What a waiting job holds, who may start before it, and what it says, as users observe it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cortex.engines.base import NOTHING, Capacity
from cortex.engines.capacity import CapacityLedger, Hold, Holds
from cortex.engines.local.machine import MachineLedger
from cortex.engines.ray.messages import NodeState
from cortex.engines.ray.placement import Placement
from cortex.operator.dispatch.line import Refuse, Start, WaitingQueue
from cortex.spec.api import Compute

ONE = Compute(cpu_m=1000)
TWO = Compute(cpu_m=2000)
ALL = Compute(cpu_m=4000)
IN_A = Compute(cpu_m=1000, node_labels={"zone": ("a",)})
IN_B = Compute(cpu_m=1000, node_labels={"zone": ("b",)})
NODE = Capacity(4000, 0, 0)
GPU_NODE = Capacity(4000, 0, 1)
BEHIND = "waits behind earlier jobs, the first of which "


class Queue:
    """A queue, and the jobs in it and beside it, in the order of their submits."""

    def __init__(self, ledger: CapacityLedger) -> None:
        self.ledger = ledger
        self.jobs: dict[str, tuple[str, Compute]] = {}
        self.waiting: set[str] = set()
        self.queue = WaitingQueue(ledger, self.waiting.__contains__)

    def submit(self, job_id: str, compute: Compute, api: str = "api") -> bool:
        """Whether the job starts at once."""
        self.jobs[job_id] = api, compute
        if self.queue.try_claim(job_id, api, compute):
            return True
        self.waiting.add(job_id)
        if self.queue.push(len(self.jobs), job_id, api, compute):
            assert Start(job_id) not in self.queue.schedule()
        return False

    def schedule(self) -> list[str]:
        """The jobs that start now."""
        decisions = self.queue.schedule()
        self.waiting.difference_update(each.job_id for each in decisions)
        return [each.job_id for each in decisions if isinstance(each, Start)]

    def end(self, *job_ids: str) -> list[str]:
        for job_id in job_ids:
            self.ledger.release(job_id)
            assert self.queue.release(self.jobs[job_id][0], job_id)
        return self.schedule()

    def why(self, job_id: str) -> str | None:
        return self.queue.why(job_id, *self.jobs[job_id])


def machine(total: Capacity = NODE) -> Queue:
    return Queue(MachineLedger(total))


def zones(**totals: Capacity) -> Placement:
    """A cluster with one node in each of these zones."""
    made = Placement()
    made.update(
        tuple(
            NodeState(name, name, True, total, NOTHING, {"zone": name})
            for name, total in totals.items()
        )
    )
    for node in made.alive.values():
        node.is_ready = True
    return made


def test_a_job_for_an_absent_kind_of_node_stops_no_other() -> None:
    cluster = zones(a=NODE, b=NODE)
    states = tuple(node.state for node in cluster.alive.values())
    cluster.update(states[:1])  # b is lost
    queue = Queue(cluster)
    for number in range(3):
        assert not queue.submit(f"b{number}", IN_B, "b")
        assert queue.why(f"b{number}") == "waits for a node with zone=b: the cluster has none now"
    assert [queue.submit(str(number), ONE) for number in range(5)] == [*[True] * 4, False]
    assert queue.submit("6", IN_A, "b") is False
    assert queue.why("4") == "needs 1 CPU, 0 free on one node"
    assert queue.end("0") == ["4"]
    cluster.update(states)
    cluster.alive["b"].is_ready = True
    assert queue.schedule() == ["b0", "b1", "b2"]


def test_a_job_whose_kind_of_node_is_absent_does_not_take_the_place_of_the_head() -> None:
    cluster = zones(a=NODE, b=Capacity(8000, 0, 0))
    cluster.alive["b"].is_ready = False
    queue = Queue(cluster)
    queue.queue.limit("tight", 1)
    assert not queue.submit("absent", Compute(cpu_m=8000), "tight")
    cluster.pop_refused()
    assert queue.schedule() == []
    assert cluster.pop_refused(), "the engine reports that a node has joined"
    assert queue.submit("first", TWO, "tight")
    assert not queue.submit("head", ALL)
    assert not queue.submit("behind", ONE)
    assert queue.end("first") == ["head"]


def test_a_submit_does_not_overtake_an_equal_job_for_which_capacity_was_freed_just_now() -> None:
    queue = machine()
    assert queue.submit("first", ALL)
    assert not queue.submit("second", TWO)
    queue.ledger.release("first")
    assert not queue.queue.try_claim("late", "other", TWO)
    assert not queue.queue.try_claim("larger", "other", ALL)
    assert queue.schedule() == ["second"]


def test_a_job_too_large_for_all_nodes_that_are_ready_stops_no_other() -> None:
    cluster = zones(a=NODE, b=Capacity(8000, 0, 0))
    cluster.alive["b"].is_ready = False
    queue = Queue(cluster)
    assert not queue.submit("large", Compute(cpu_m=8000))
    assert queue.why("large") == "needs 8 CPU, 4 free on one node"
    assert queue.submit("1", ALL)
    cluster.alive["b"].is_ready = True
    assert queue.schedule() == ["large"]


def test_a_job_that_waits_in_one_zone_leaves_the_other_zones_alone() -> None:
    queue = Queue(zones(a=NODE, b=NODE))
    assert queue.submit("b", Compute(cpu_m=3000, node_labels={"zone": ("b",)}))
    assert not queue.submit("large b", Compute(cpu_m=4000, node_labels={"zone": ("b",)}))
    assert not queue.submit("small b", IN_B)
    assert queue.why("large b") == "needs 4 CPU, 1 free on one node with zone=b"
    assert queue.why("small b") == f"{BEHIND}{queue.why('large b')}"
    assert queue.submit("a", ALL)
    assert not queue.submit("anywhere", ONE)
    assert queue.why("anywhere") == f"{BEHIND}{queue.why('large b')}"
    assert queue.end("b") == ["large b"]


@pytest.mark.parametrize(
    "make", [machine, lambda total: Queue(zones(a=total))], ids=["machine", "cluster"]
)
class TestOneMachine:
    def test_a_job_that_needs_all_blocks_all_behind_it(
        self, make: Callable[[Capacity], Queue]
    ) -> None:
        queue = make(NODE)
        assert queue.submit("first", ONE)
        assert not queue.submit("all", ALL)
        assert [queue.submit(str(number), ONE) for number in range(3)] == [False] * 3
        assert all((queue.why(str(number)) or "").startswith(BEHIND) for number in range(3))
        assert queue.end("first") == ["all"]
        assert queue.end("all") == ["0", "1", "2"]

    def test_a_job_that_waits_for_a_gpu_keeps_its_cores_and_no_more(
        self, make: Callable[[Capacity], Queue]
    ) -> None:
        queue = make(GPU_NODE)
        assert queue.submit("gpu", Compute(cpu_m=1000, gpu=1))
        assert not queue.submit("next gpu", Compute(cpu_m=2000, gpu=1), "other")
        assert queue.submit("cpu", ONE)
        assert (queue.why("next gpu") or "").startswith("needs 1 GPU, 0 free")
        for number in range(3):  # a stream of jobs that would have taken the cores
            assert not queue.submit(str(number), ONE)
        assert queue.why("0") == f"{BEHIND}{queue.why('next gpu')}"
        assert queue.end("gpu") == ["next gpu", "0"]

    def test_equal_jobs_start_in_their_order(self, make: Callable[[Capacity], Queue]) -> None:
        queue = make(NODE)
        assert queue.submit("0", ALL)
        for number in range(1, 9):
            assert not queue.submit(str(number), TWO, f"api {number % 3}")
        started = ["0"]
        for job_id in started:
            started += queue.end(job_id)
        assert started == [str(number) for number in range(9)]

    def test_memory_that_is_held_blocks_no_job_without_a_request_for_memory(
        self, make: Callable[[Capacity], Queue]
    ) -> None:
        queue = make(Capacity(4000, 4 << 30, 0))
        assert queue.submit("first", Compute(cpu_m=1000, mem=3 << 30))
        assert not queue.submit("large", Compute(cpu_m=1000, mem=4 << 30))
        assert not queue.submit("some", Compute(cpu_m=1000, mem=1 << 30))
        assert queue.submit("none", ONE)
        assert queue.end("first") == ["large"]

    def test_a_refused_job_holds_nothing(self, make: Callable[[Capacity], Queue]) -> None:
        queue = make(NODE)
        assert queue.submit("first", ALL)
        assert not queue.queue.try_claim("huge", "api", Compute(cpu_m=9000))
        queue.waiting.add("huge")
        assert queue.queue.push(9, "huge", "api", Compute(cpu_m=9000))
        (decision,) = queue.queue.schedule()
        assert isinstance(decision, Refuse)
        assert decision.reason.startswith("needs 9 CPU, ")

    def test_a_head_keeps_its_place_among_the_running_jobs_of_its_api(
        self, make: Callable[[Capacity], Queue]
    ) -> None:
        queue = make(GPU_NODE)
        queue.queue.limit("tight", 1)
        assert queue.submit("gpu", Compute(cpu_m=1000, gpu=1), "other")
        assert not queue.submit("old version", Compute(cpu_m=1000, gpu=1), "tight")
        assert not queue.submit("new version", ONE, "tight")
        assert queue.why("new version") == f"{BEHIND}{queue.why('old version')}"
        assert queue.submit("other", ONE, "other")
        assert queue.end("gpu") == ["old version"]
        reason = "1 job of this API is running, its limits.max_running"
        assert queue.why("new version") == reason
        assert queue.end("old version") == ["new version"]

    def test_jobs_of_an_api_at_its_limit_hold_nothing(
        self, make: Callable[[Capacity], Queue]
    ) -> None:
        queue = make(NODE)
        queue.queue.limit("tight", 1)
        assert queue.submit("running", ONE, "tight")
        assert not queue.submit("limited", ALL, "tight")
        assert queue.submit("1", TWO)
        assert queue.submit("2", ONE)

    def test_a_stopped_head_gives_its_hold_back(self, make: Callable[[Capacity], Queue]) -> None:
        queue = make(NODE)
        assert queue.submit("first", TWO)
        assert not queue.submit("all", ALL, "large")
        assert not queue.submit("next", TWO)
        queue.waiting.discard("all")
        assert queue.queue.remove("all", "large", ALL)
        assert queue.schedule() == ["next"]


def test_a_large_job_is_not_starved_on_any_node_by_small_jobs() -> None:
    queue = Queue(zones(a=NODE, b=NODE))
    running = [str(number) for number in range(8)]
    assert all(queue.submit(job_id, ONE) for job_id in running)
    assert not queue.submit("large", ALL)
    for number in range(100):  # one job after the other ends, and another is submitted
        if "large" in queue.end(running.pop(0)):
            break
        running.append(f"later {number}")
        if not queue.submit(running[-1], ONE):
            running.pop()
    assert "large" not in queue.waiting
    assert number < 8


def test_the_second_job_of_a_selection_waits_without_a_hold_and_becomes_the_head() -> None:
    queue = Queue(zones(a=NODE, b=NODE))
    assert queue.submit("a", Compute(cpu_m=3000))
    assert queue.submit("b", Compute(cpu_m=3000))
    assert not queue.submit("first", ALL)
    assert not queue.submit("second", ALL)
    assert queue.submit("small", ONE)
    assert not queue.submit("too much", ONE)
    assert queue.end("a", "b") == ["first"]
    assert queue.end("small") == ["second"]
    assert queue.end("first") == ["too much"]


def test_an_earlier_job_that_joins_late_goes_first() -> None:
    queue = machine()
    assert queue.submit("first", ALL)
    assert not queue.submit("second", ALL)
    queue.waiting.add("early")
    queue.jobs["early"] = "api", TWO
    assert queue.queue.push(0, "early", "api", TWO)
    assert queue.schedule() == []
    assert queue.end("first") == ["early"]
    assert queue.why("second") == "needs 4 CPU, 2 free"


class CountingLedger(MachineLedger):
    """Counts the questions."""

    asked = 0

    def refusal(self, compute: Compute) -> str | None:
        self.asked += 1
        return super().refusal(compute)

    def reserve(self, job_id: str, compute: Compute, *holds: Any) -> str | Hold | None:
        self.asked += 1
        return super().reserve(job_id, compute, *holds)


def test_a_submit_and_an_end_cost_the_same_however_many_jobs_wait() -> None:
    asked: dict[int, list[int]] = {}
    for waiting in (10, 1000):
        ledger = CountingLedger(NODE)
        queue = Queue(ledger)
        assert queue.submit("first", ALL)
        for number in range(waiting):
            queue.submit(str(number), TWO, f"api {number % 5}")
        asked[waiting] = []
        ledger.asked = 0
        assert not queue.submit("last", TWO)
        asked[waiting].append(ledger.asked)
        ledger.asked = 0
        assert queue.end("first") == ["0", "1"]
        asked[waiting].append(ledger.asked)
    assert asked[10] == asked[1000]
    assert all(counts < 20 for counts in asked[1000])


def test_a_hold_stays_on_its_node_while_that_can_run_the_job() -> None:
    cluster = zones(a=NODE, b=NODE, c=NODE)
    cluster.reserve("a", Compute(cpu_m=3000))
    cluster.reserve("b", TWO)
    cluster.reserve("c", ONE)
    hold = cluster.hold("large", ALL, Holds(), None)
    assert hold == Hold("large", cluster.alive["c"].number, NODE)  # it lacks least
    cluster.release("a")
    assert cluster.hold("large", ALL, Holds(), hold) == hold
    cluster.alive["c"].is_ready = False
    assert cluster.hold("large", ALL, Holds(), hold).node == cluster.alive["a"].number


def test_a_hold_prefers_nodes_that_other_programs_and_other_holds_leave() -> None:
    cluster = zones(a=NODE, b=NODE, g=GPU_NODE)
    cluster.reserve("b", ONE)
    for _ in range(2):
        cluster.update(
            tuple(
                NodeState(name, name, True, node.state.total, taken, node.state.labels)
                for name, node in cluster.alive.items()
                for taken in [Capacity(500, 0, 0) if name == "a" else NOTHING]
            )
        )
    hold = cluster.hold("large", ALL, Holds(), None)
    assert hold.node == cluster.alive["b"].number  # others use a, and g has a GPU
    holds = Holds()
    holds.add(hold)
    two_free = cluster.hold("second", TWO, holds, None)
    assert two_free.node == cluster.alive["a"].number
    with_gpu = cluster.hold("gpu", Compute(cpu_m=1000, gpu=1), holds, None)
    assert with_gpu.node == cluster.alive["g"].number
