"""Which node takes a job, and the reason where none does."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex.engines.base import NOTHING, Capacity
from cortex.engines.capacity import fits
from cortex.engines.ray.messages import Drain, NodeState
from cortex.engines.ray.placement import CapacityIndex, Placement
from cortex.spec.api import Compute

GIB = 1 << 30


def state(
    name: str, total: Capacity, taken: Capacity = NOTHING, labels: dict[str, str] | None = None
) -> NodeState:
    return NodeState(name, f"host-{name}", True, total, taken, labels or {})


def nodes(*states: NodeState) -> Placement:
    made = Placement()
    made.update(states)
    for node in made.alive.values():
        node.is_ready = True
    return made


SMALL = Capacity(2000, 4 * GIB, 0)
LARGE = Capacity(8000, 16 * GIB, 2)


def test_a_job_goes_to_the_emptiest_node_and_spares_gpus_for_jobs_that_need_them() -> None:
    cluster = nodes(state("a", SMALL), state("b", SMALL), state("g", LARGE))
    for job, expected in (("1", "a"), ("2", "b"), ("3", "a"), ("4", "b"), ("5", "g")):
        assert cluster.reserve(job, Compute(cpu_m=1000)) is None
        node = cluster.node_of(job)
        assert node is not None
        assert node.node_id == expected
    assert cluster.reserve("6", Compute(cpu_m=1000, gpu=2)) is None
    assert cluster.reserve("7", Compute(gpu=1)) == "needs 1 GPU, 0 free on one node"


def test_all_requested_resources_must_be_free_on_one_node() -> None:
    cluster = nodes(state("a", SMALL), state("b", SMALL))
    assert cluster.reserve("1", Compute(cpu_m=1500, mem=GIB)) is None
    assert cluster.reserve("2", Compute(cpu_m=500, mem=3 * GIB)) is None
    wanted = Compute(cpu_m=1500, mem=4 * GIB)
    assert cluster.reserve("3", wanted) == "needs 4 GiB, 3 GiB free on one node"
    wanted = Compute(cpu_m=1500, mem=3 * GIB)
    assert cluster.reserve("3", wanted) == "no node has 1.5 CPU and 3 GiB free"
    assert cluster.remove_reservation("1")
    assert cluster.reserve("3", wanted) is None


def test_a_refusal_is_remembered_until_it_is_popped() -> None:
    cluster = nodes(state("a", SMALL))
    assert cluster.reserve("1", Compute(cpu_m=2000)) is None
    assert not cluster.pop_refused()
    assert cluster.reserve("2", Compute(cpu_m=2000)) == "needs 2 CPU, 0 free on one node"
    assert cluster.pop_refused()
    assert not cluster.pop_refused()


def test_a_request_that_no_node_ever_met_is_refused_and_one_that_a_lost_node_met_waits() -> None:
    cluster = nodes(state("a", SMALL), state("g", LARGE))
    assert cluster.refusal(Compute(gpu=4)) == "needs 4 GPUs, the largest node has 2"
    (lost,) = cluster.update((state("a", SMALL),))
    assert lost.name == "host-g"
    assert cluster.refusal(Compute(gpu=2)) is None
    assert cluster.reserve("1", Compute(gpu=2)) == "needs 2 GPUs, 0 free on one node"
    assert cluster.refusal(Compute(cpu_m=8000, mem=GIB)) is None


def test_a_request_that_no_single_node_meets_is_refused() -> None:
    cluster = nodes(state("a", Capacity(8000, GIB, 0)), state("b", Capacity(1000, 8 * GIB, 0)))
    wanted = Compute(cpu_m=4000, mem=4 * GIB)
    assert cluster.refusal(wanted) == "no node has 4 CPU and 4 GiB"


def test_jobs_wait_with_a_reason_while_no_node_answers() -> None:
    empty = Placement()
    assert empty.refusal(Compute(gpu=99)) is None
    assert empty.reserve("1", Compute()) == "waits for a node: the cluster has none now"
    cluster = nodes(state("a", SMALL))
    cluster.alive["a"].is_ready = False
    assert cluster.reserve("1", Compute()) == "waits for a node that takes jobs"
    cluster.alive["a"].problem = "its agent has exited"
    assert (
        cluster.reserve("1", Compute())
        == "waits for a node that takes jobs (host-a: its agent has exited)"
    )


def test_a_node_that_is_being_drained_takes_no_job_and_says_so() -> None:
    drained = replace(state("b", LARGE, labels={"zone": "b"}), drain=Drain(90.4))
    cluster = nodes(state("a", SMALL), state("b", LARGE, labels={"zone": "b"}))
    cluster.update((state("a", SMALL), drained))
    for job in ("1", "2"):
        assert cluster.reserve(job, Compute(cpu_m=1000)) is None
        node = cluster.node_of(job)
        assert node is not None
        assert node.node_id == "a"
    assert cluster.reserve("3", Compute(cpu_m=1000)) == "needs 1 CPU, 0 free on one node"
    reason = "waits for a node with zone=b that takes jobs (host-b: it is being drained)"
    assert cluster.reserve("3", Compute(node_labels={"zone": ("b",)})) == reason
    shown = {node.name: (node.is_ready, node.problem) for node in cluster.nodes()}
    assert shown == {
        "host-a": (True, None),
        "host-b": (False, "it is being drained, and ends in 90 s"),
    }
    cluster.update((state("a", SMALL), replace(drained, drain=Drain(None))))
    assert cluster.nodes()[1].problem == "it is being drained"


def test_the_unmet_demand_is_what_fits_on_no_node_beside_the_jobs_before_it() -> None:
    cluster = nodes(state("a", SMALL), state("b", SMALL, labels={"zone": "b"}))
    one, two = Compute(cpu_m=1000), Compute(cpu_m=2000)
    zoned = Compute(cpu_m=1500, node_labels={"zone": ("a", "b")})
    elsewhere = Compute(node_labels={"zone": ("c",)})
    assert cluster.unmet([two, two]) == []
    assert cluster.unmet([two, two, one]) == [one]
    assert cluster.unmet([zoned, one, one, one, zoned]) == [one, zoned]
    assert cluster.unmet([elsewhere, one]) == [elsewhere]
    assert cluster.reserve("1", two) is None
    assert cluster.unmet([zoned, two]) == [two]


def test_a_node_meets_demand_before_its_agent_answers_but_not_after_it_has_failed() -> None:
    cluster = nodes(state("a", SMALL))
    wanted = [Compute(cpu_m=1000)]
    cluster.alive["a"].is_ready = False
    assert cluster.unmet(wanted) == []
    cluster.alive["a"].problem = "its agent does not answer"
    assert cluster.unmet(wanted) == wanted
    cluster.alive["a"].is_ready = True
    cluster.update((replace(state("a", SMALL), drain=Drain(None)),))
    assert cluster.unmet(wanted) == wanted


# A busy machine can pause for longer than any deadline.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    free=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["a", "b"])), max_size=4),
    wanted=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "a", "b"])), max_size=12),
)
def test_unmet_demand_agrees_with_a_search_of_all_nodes_for_each_job(
    free: list[tuple[int, str]], wanted: list[tuple[int, str]]
) -> None:
    cluster = nodes(
        *(state(str(i), Capacity(cpu, 0, 0), labels={"z": z}) for i, (cpu, z) in enumerate(free))
    )
    left, unmet = [cpu for cpu, _ in free], []
    computes = [Compute(cpu_m=cpu, node_labels={"z": (z,)} if z else {}) for cpu, z in wanted]
    for compute, (cpu, z) in zip(computes, wanted, strict=True):
        for index, (_, zone) in enumerate(free):
            if left[index] >= cpu and z in ("", zone):
                left[index] -= cpu
                break
        else:
            unmet.append(compute)
    assert cluster.unmet(computes) == unmet


def test_a_cluster_with_an_autoscaler_refuses_no_job_and_says_what_it_waits_for() -> None:
    cluster = Placement(has_autoscaler=True)
    cluster.update((state("a", SMALL),))
    cluster.alive["a"].is_ready = True
    assert cluster.refusal(Compute(gpu=4)) is None
    reason = "waits for a node that the cluster's autoscaler adds: "
    assert cluster.reserve("1", Compute(gpu=4)) == f"{reason}needs 4 GPUs, the largest node has 0"
    assert cluster.reserve("1", Compute(cpu_m=2000)) is None
    assert cluster.reserve("2", Compute(cpu_m=2000)) == "needs 2 CPU, 0 free on one node"


def test_resources_that_others_use_count_after_two_observations() -> None:
    cluster = nodes(state("a", SMALL))
    assert cluster.reserve("1", Compute(cpu_m=500)) is None
    cluster.alive["a"].set_held(Capacity(500, 0, 0))
    # 500 for this operator's job, 1000 for others.
    states = (state("a", SMALL, Capacity(1500, 0, 0)),)
    cluster.update(states)
    assert cluster.alive["a"].free.cpu_m == 1500
    cluster.update(states)
    assert cluster.alive["a"].free.cpu_m == 500
    cluster.update((state("a", SMALL, Capacity(500, 0, 0)),))
    assert cluster.alive["a"].free.cpu_m == 1500


def test_a_job_whose_reservation_follows_counts_beside_what_others_use() -> None:
    cluster = nodes(state("a", SMALL))
    assert cluster.reserve("1", Compute(cpu_m=500)) is None
    states = (state("a", SMALL, Capacity(1000, 0, 0)),)  # of others alone
    cluster.update(states)
    cluster.update(states)
    assert cluster.alive["a"].free.cpu_m == 500


def test_a_reservation_that_was_released_a_moment_ago_is_not_counted_as_anothers() -> None:
    cluster = nodes(state("a", SMALL))
    node = cluster.alive["a"]
    node.set_held(Capacity(500, 0, 0))
    taken = (state("a", SMALL, Capacity(500, 0, 0)),)
    for _ in range(2):
        cluster.update(taken)
    node.set_held(NOTHING)
    cluster.update(taken)  # Ray's figure lags
    assert node.free == SMALL
    cluster.update((state("a", SMALL),))
    assert node.free == SMALL


def test_a_suspect_node_takes_no_job_for_a_while_and_for_longer_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cluster = nodes(state("a", SMALL))
    node = cluster.alive["a"]
    for pause_s in (30, 60, 120):
        node.suspect("it does not take orders")
        assert cluster.reserve("1", Compute()) is not None
        now[0] += pause_s - 1
        node.answered(None)
        assert (node.is_ready, node.problem) == (False, "it does not take orders")
        now[0] += 1
        node.answered(None)
        assert (node.is_ready, node.problem) == (True, None)
    node.trust()
    node.suspect("again")
    now[0] += 30
    node.answered("its raylet does not answer")
    assert (node.is_ready, node.problem) == (False, "its raylet does not answer")
    node.answered(None)
    assert node.is_ready


def test_a_suspect_node_does_not_keep_a_problem_that_has_passed() -> None:
    node = nodes(state("a", SMALL)).alive["a"]
    node.suspect("its agent does not take orders")
    node.answered("its raylet does not answer")
    node.answered(None)
    assert (node.is_ready, node.problem) == (False, "its agent does not take orders")


def test_a_silent_node_keeps_its_other_problem() -> None:
    node = nodes(state("a", SMALL)).alive["a"]
    assert not node.set_silent(is_silent=False)
    node.answered("its raylet does not answer")
    assert not node.set_silent(is_silent=True)
    assert node.problem == "its raylet does not answer"
    node.answered(None)
    assert node.set_silent(is_silent=True)
    assert node.set_silent(is_silent=False)
    assert node.is_ready


def test_a_recovered_job_counts_even_beyond_the_capacity_of_its_node() -> None:
    cluster = nodes(state("a", SMALL))
    for number in range(3):
        cluster.reserve_granted(str(number), Compute(cpu_m=1000), "a")
    cluster.reserve_granted("elsewhere", Compute(cpu_m=1000), "a lost node")
    assert cluster.alive["a"].free.cpu_m == -1000
    assert cluster.reserve("4", Compute(cpu_m=1)) == "needs 0.001 CPU, 0 free on one node"
    assert cluster.node_of("elsewhere") is None


A_OR_B = Compute(cpu_m=1500, node_labels={"zone": ("a", "b")})
C = Compute(node_labels={"zone": ("c",), "disk": ("ssd",)})


def test_labels_select_nodes_and_the_reason_names_the_labels() -> None:
    cluster = nodes(
        state("a", SMALL, labels={"zone": "a"}),
        state("b", SMALL, labels={"zone": "b", "disk": "ssd"}),
        state("c", LARGE, labels={"zone": "c"}),
    )
    for job, expected in (("1", "a"), ("2", "b")):
        assert cluster.reserve(job, A_OR_B) is None
        node = cluster.node_of(job)
        assert node is not None
        assert node.node_id == expected
    assert cluster.reserve("3", A_OR_B) == "needs 1.5 CPU, 0.5 free on one node with zone=a or b"
    assert cluster.remove_reservation("2")
    assert cluster.reserve("3", A_OR_B) is None
    assert cluster.refusal(C) == "needs a node with zone=c, disk=ssd, and there is none"
    wanted = Compute(cpu_m=9000, node_labels={"zone": ("c",)})
    assert cluster.refusal(wanted) == "needs 9 CPU, the largest node with zone=c has 8"
    wanted = Compute(cpu_m=1000, mem=GIB, gpu=1, node_labels={"zone": ("b",)})
    assert cluster.refusal(wanted) == "needs 1 GPU, the largest node with zone=b has 0"


def test_a_request_for_labels_is_accepted_once_a_matching_node_joins() -> None:
    cluster = nodes(state("a", SMALL))
    assert cluster.refusal(C) is not None
    cluster.update((state("a", SMALL), state("c", SMALL, labels={"zone": "c", "disk": "ssd"})))
    assert cluster.refusal(C) is None
    reason = "waits for a node with zone=c, disk=ssd that takes jobs"
    assert cluster.reserve("1", C) == reason
    cluster.alive["c"].is_ready = True
    assert cluster.reserve("1", C) is None
    cluster.update((state("a", SMALL),))
    reason = "waits for a node with zone=c, disk=ssd: the cluster has none now"
    assert cluster.reserve("2", C) == reason


@st.composite
def _steps(draw: st.DrawFn) -> list[tuple[str, int, Capacity]]:
    amounts = st.integers(0, 5)
    capacity = st.builds(Capacity, amounts, amounts, amounts)
    step = st.tuples(st.sampled_from(["put", "drop"]), st.integers(0, 6), capacity)
    return draw(st.lists(step, max_size=30))


# A busy machine can pause for longer than any deadline.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=_steps(), wanted=st.tuples(*[st.integers(0, 5)] * 3))
def test_a_capacity_index_finds_the_node_that_a_search_of_all_nodes_would(
    steps: list[tuple[str, int, Capacity]], wanted: tuple[int, int, int]
) -> None:
    index: CapacityIndex[int] = CapacityIndex()
    present: dict[int, Capacity] = {}
    for what, number, free in steps:
        index.discard(number)
        present.pop(number, None)
        if what == "put":
            index.add(number, free, number)
            present[number] = free
    compute = Compute(cpu_m=wanted[0], mem=wanted[1], gpu=wanted[2])
    candidates = [(-free.cpu_m, number) for number, free in present.items() if fits(compute, free)]
    assert index.emptiest_for(compute) == (min(candidates)[1] if candidates else None)
    max_free = Capacity(0, 0, 0)
    for free in present.values():
        max_free = max_free.maximum(free)
    assert index.max_free == max_free
    assert index.is_empty == (not present)
