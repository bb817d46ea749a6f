"""What the ledgers of the engines promise: a job has what it has reserved until that is given back, and
jobs that were refused are considered again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cortex.engines.base import NOTHING, Capacity
from cortex.engines.capacity import CapacityLedger, amounts, lacking
from cortex.engines.local.machine import MachineLedger
from cortex.engines.ray.messages import NodeState
from cortex.engines.ray.placement import Placement
from cortex.spec.api import Compute

GIB = 1 << 30
TOTAL = Capacity(2000, 4 * GIB, 2)
HALF = Compute(cpu_m=1000, mem=2 * GIB, gpu=1)
ALL = Compute(cpu_m=2000, mem=4 * GIB, gpu=2)

Made = tuple[CapacityLedger, list[str]]


def machine() -> Made:
    reported: list[str] = []
    return MachineLedger(TOTAL, report_freed=lambda: reported.append("freed")), reported


def cluster() -> Made:
    reported: list[str] = []
    made = Placement(lambda: reported.append("freed"))
    made.update((NodeState("a", "a", True, TOTAL, NOTHING),))
    made.alive["a"].is_ready = True
    return made, reported


@pytest.fixture(params=[machine, cluster])
def ledger(request: pytest.FixtureRequest) -> Made:
    make: Callable[[], Made] = request.param
    return make()


def free(ledger: CapacityLedger) -> Capacity:
    (node,) = ledger.nodes()
    assert node.total == TOTAL
    assert node.is_ready
    return node.free


def test_a_reservation_lasts_until_it_is_released(ledger: Made) -> None:
    books, _ = ledger
    assert books.reserve("1", HALF) is None
    assert free(books) == Capacity(1000, 2 * GIB, 1)
    books.release("1")
    assert free(books) == TOTAL


def test_a_second_call_changes_nothing(ledger: Made) -> None:
    books, reported = ledger
    for _ in range(2):
        assert books.reserve("1", HALF) is None
        assert free(books) == Capacity(1000, 2 * GIB, 1)
    assert books.reserve("2", ALL) is not None
    for _ in range(2):
        books.release("1")
        assert free(books) == TOTAL
        assert reported == ["freed"]


def test_a_job_that_does_not_fit_reserves_nothing_and_says_what_it_lacks(ledger: Made) -> None:
    books, _ = ledger
    assert books.reserve("1", HALF) is None
    words = books.reserve("2", ALL)
    assert words is not None
    assert words.startswith("needs 2 CPU, 1 free")
    assert "; needs 4 GiB, 2 GiB free" in words
    assert "; needs 2 GPUs, 1 free" in words
    assert free(books) == Capacity(1000, 2 * GIB, 1)


def test_freed_capacity_is_reported_once_and_only_where_a_job_was_refused(ledger: Made) -> None:
    books, reported = ledger
    assert books.reserve("1", HALF) is None
    books.release("1")
    assert reported == []
    assert books.reserve("1", ALL) is None
    assert books.reserve("2", HALF) is not None
    assert books.reserve("3", HALF) is not None
    books.release("none")
    assert reported == []
    books.release("1")
    assert reported == ["freed"]
    assert books.reserve("2", HALF) is None
    books.release("2")
    assert reported == ["freed"]


def test_what_could_never_run_is_refused_whatever_is_free(ledger: Made) -> None:
    books, _ = ledger
    assert books.refusal(ALL) is None
    assert books.reserve("1", ALL) is None
    assert books.refusal(ALL) is None
    words = books.refusal(Compute(gpu=8))
    assert words is not None
    assert words.startswith("needs 8 GPUs, ")
    assert books.refusal(Compute(node_labels={"zone": ("a",)})) is not None


def test_the_end_of_an_attempt_gives_back_and_the_engine_reports() -> None:
    for made, reported in (machine(), cluster()):
        assert isinstance(made, MachineLedger | Placement)
        assert made.reserve("1", ALL) is None
        assert made.reserve("2", HALF) is not None
        assert made.remove_reservation("1")
        assert not made.remove_reservation("1")
        assert made.pop_refused()
        assert not made.pop_refused()
        assert reported == []


def test_a_release_undoes_what_was_prepared_before_the_capacity_is_free() -> None:
    undone: list[tuple[str, Capacity]] = []
    made = MachineLedger(TOTAL, lambda job_id: undone.append((job_id, made.free)))
    assert made.reserve("1", HALF) is None
    made.release("1")
    assert undone == [("1", Capacity(1000, 2 * GIB, 1))]
    assert made.reserve("1", HALF) is None
    made.remove_reservation("1")
    assert len(undone) == 1


def test_no_two_jobs_of_a_machine_have_the_same_gpu() -> None:
    made = MachineLedger(TOTAL)
    assert made.reserve("1", HALF) is None
    assert made.reserve("2", HALF) is None
    assert (made.gpus("1"), made.gpus("2"), made.gpus("none")) == ([0], [1], [])
    made.remove_reservation("1")
    assert made.reserve("3", HALF) is None
    assert made.gpus("3") == [0]


def test_a_granted_job_counts_even_beyond_what_the_machine_has() -> None:
    made = MachineLedger(TOTAL)
    made.reserve_granted("1", ALL, [1, 0])
    made.reserve_granted("2", Compute(cpu_m=2000, mem=4 * GIB), [])
    assert made.gpus("1") == [1, 0]
    assert made.free == Capacity(-2000, -4 * GIB, 0)
    assert made.reserve("3", Compute(cpu_m=1)) == "needs 0.001 CPU, 0 free"
    made.reserve_granted("2", Compute(cpu_m=1000, mem=GIB), [])
    assert made.free == Capacity(-1000, -GIB, 0)
    made.remove_reservation("1")
    made.remove_reservation("2")
    assert made.free == TOTAL


def test_a_granted_job_whose_gpus_are_unknown_gets_free_ones() -> None:
    made = MachineLedger(TOTAL)
    made.reserve_granted("1", HALF, [0])
    made.reserve_granted("2", HALF, [])
    assert made.gpus("2") == [1]


def test_reservations_outlast_a_change_of_the_total() -> None:
    made = MachineLedger(NOTHING)
    made.reserve_granted("1", HALF, [0])
    made.set_total(TOTAL)
    assert (made.total, made.free) == (TOTAL, Capacity(1000, 2 * GIB, 1))
    made.remove_reservation("1")
    assert made.free == TOTAL


def test_what_is_lacking_is_said_in_words_for_each_kind() -> None:
    assert lacking(HALF, TOTAL, "{} free") is None
    assert lacking(ALL, Capacity(500, -1, 1), "{} free") == (
        "needs 2 CPU, 0.5 free; needs 4 GiB, 0 B free; needs 2 GPUs, 1 free"
    )
    assert lacking(Compute(cpu_m=500, mem=None), Capacity(500, 0, 0), "{} free") is None
    assert amounts(HALF) == "1 CPU and 2 GiB and 1 GPU"
    assert amounts(Compute(cpu_m=500)) == "0.5 CPU"
