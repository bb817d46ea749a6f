"""Which node takes a job, and in which words it is said that none does."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex.engines.base import NOTHING, Capacity
from cortex.engines.capacity import fits
from cortex.engines.ray.messages import NodeState
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


def test_jobs_go_where_most_is_free_and_gpus_are_left_to_those_that_want_them() -> None:
    cluster = nodes(state("a", SMALL), state("b", SMALL), state("g", LARGE))
    for job, expected in (("1", "a"), ("2", "b"), ("3", "a"), ("4", "b"), ("5", "g")):
        assert cluster.reserve(job, Compute(cpu_m=1000)) is None
        node = cluster.node_of(job)
        assert node is not None
        assert node.node_id == expected
    assert cluster.reserve("6", Compute(cpu_m=1000, gpu=2)) is None
    assert cluster.reserve("7", Compute(gpu=1)) == "needs 1 GPU, 0 free on one node"


def test_what_is_asked_for_must_be_free_on_one_node() -> None:
    cluster = nodes(state("a", SMALL), state("b", SMALL))
    assert cluster.reserve("1", Compute(cpu_m=1500, mem=GIB)) is None
    assert cluster.reserve("2", Compute(cpu_m=500, mem=3 * GIB)) is None
    wanted = Compute(cpu_m=1500, mem=4 * GIB)
    assert cluster.reserve("3", wanted) == "needs 4 GiB, 3 GiB free on one node"
    wanted = Compute(cpu_m=1500, mem=3 * GIB)
    assert cluster.reserve("3", wanted) == "no node has 1.5 CPU and 3 GiB free"
    assert cluster.remove_reservation("1")
    assert cluster.reserve("3", wanted) is None


def test_only_who_was_told_to_wait_is_told_of_more() -> None:
    cluster = nodes(state("a", SMALL))
    assert cluster.reserve("1", Compute(cpu_m=2000)) is None
    assert not cluster.pop_refused()
    assert cluster.reserve("2", Compute(cpu_m=2000)) == "needs 2 CPU, 0 free on one node"
    assert cluster.pop_refused()
    assert not cluster.pop_refused()


def test_what_no_node_ever_had_is_refused_and_what_a_lost_one_had_is_waited_for() -> None:
    cluster = nodes(state("a", SMALL), state("g", LARGE))
    assert cluster.refusal(Compute(gpu=4)) == "needs 4 GPUs, the largest node has 2"
    (lost,) = cluster.update((state("a", SMALL),))
    assert lost.name == "host-g"
    assert cluster.refusal(Compute(gpu=2)) is None
    assert cluster.reserve("1", Compute(gpu=2)) == "needs 2 GPUs, 0 free on one node"
    assert cluster.refusal(Compute(cpu_m=8000, mem=GIB)) is None


def test_no_single_node_having_all_of_it_is_a_refusal() -> None:
    cluster = nodes(state("a", Capacity(8000, GIB, 0)), state("b", Capacity(1000, 8 * GIB, 0)))
    wanted = Compute(cpu_m=4000, mem=4 * GIB)
    assert cluster.refusal(wanted) == "no node has 4 CPU and 4 GiB"


def test_without_a_node_that_answers_jobs_wait_and_say_so() -> None:
    empty = Placement()
    assert empty.refusal(Compute(gpu=99)) is None
    assert empty.reserve("1", Compute()) == "waits for a node: the cluster has none now"
    cluster = nodes(state("a", SMALL))
    cluster.alive["a"].is_ready = False
    assert cluster.reserve("1", Compute()) == "waits for a node whose agent answers"
    cluster.alive["a"].problem = "its agent is gone"
    assert (
        cluster.reserve("1", Compute()) == "waits for a node whose agent answers: its agent is gone"
    )


def test_what_others_take_counts_once_it_was_seen_twice() -> None:
    cluster = nodes(state("a", SMALL))
    assert cluster.reserve("1", Compute(cpu_m=500)) is None
    told = (state("a", SMALL, Capacity(1500, 0, 0)),)  # ours, and 1000 of others
    cluster.update(told)
    assert cluster.alive["a"].free.cpu_m == 1500
    cluster.update(told)
    assert cluster.alive["a"].free.cpu_m == 500
    cluster.update((state("a", SMALL, Capacity(500, 0, 0)),))
    assert cluster.alive["a"].free.cpu_m == 1500


def test_a_recovered_job_counts_even_beyond_what_there_is() -> None:
    cluster = nodes(state("a", SMALL))
    for number in range(3):
        cluster.reserve_granted(str(number), Compute(cpu_m=1000), "a")
    cluster.reserve_granted("elsewhere", Compute(cpu_m=1000), "gone")
    assert cluster.alive["a"].free.cpu_m == -1000
    assert cluster.reserve("4", Compute(cpu_m=1)) == "needs 0.001 CPU, 0 free on one node"
    assert cluster.node_of("elsewhere") is None


A_OR_B = Compute(cpu_m=1500, node_labels={"zone": ("a", "b")})
C = Compute(node_labels={"zone": ("c",), "disk": ("ssd",)})


def test_labels_select_nodes_and_say_so_where_there_is_none() -> None:
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


def test_nodes_with_labels_that_come_later_are_not_refused_for_good() -> None:
    cluster = nodes(state("a", SMALL))
    assert cluster.refusal(C) is not None
    cluster.update((state("a", SMALL), state("c", SMALL, labels={"zone": "c", "disk": "ssd"})))
    assert cluster.refusal(C) is None
    words = "waits for a node with zone=c, disk=ssd whose agent answers"
    assert cluster.reserve("1", C) == words
    cluster.alive["c"].is_ready = True
    assert cluster.reserve("1", C) is None
    cluster.update((state("a", SMALL),))
    words = "waits for a node with zone=c, disk=ssd: the cluster has none now"
    assert cluster.reserve("2", C) == words


@st.composite
def _steps(draw: st.DrawFn) -> list[tuple[str, int, Capacity]]:
    amounts = st.integers(0, 5)
    capacity = st.builds(Capacity, amounts, amounts, amounts)
    step = st.tuples(st.sampled_from(["put", "drop"]), st.integers(0, 6), capacity)
    return draw(st.lists(step, max_size=30))


# A busy machine may stand still.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=_steps(), wanted=st.tuples(*[st.integers(0, 5)] * 3))
def test_a_capacity_index_finds_the_node_that_a_search_of_all_nodes_would(
    steps: list[tuple[str, int, Capacity]], wanted: tuple[int, int, int]
) -> None:
    index: CapacityIndex[int] = CapacityIndex()
    there: dict[int, Capacity] = {}
    for what, number, free in steps:
        index.discard(number)
        there.pop(number, None)
        if what == "put":
            index.add(number, free, number)
            there[number] = free
    compute = Compute(cpu_m=wanted[0], mem=wanted[1], gpu=wanted[2])
    enough = [(-free.cpu_m, number) for number, free in there.items() if fits(compute, free)]
    assert index.emptiest_for(compute) == (min(enough)[1] if enough else None)
    most = Capacity(0, 0, 0)
    for free in there.values():
        most = most.maximum(free)
    assert index.max_free == most
    assert index.is_empty == (not there)
