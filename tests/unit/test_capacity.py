"""What the ledgers of the engines promise: a job has its capacity from its reservation until the
release, and refused jobs are considered again."""

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

LedgerAndReports = tuple[CapacityLedger, list[str]]


def machine() -> LedgerAndReports:
    reported: list[str] = []
    return MachineLedger(TOTAL, report_freed=lambda: reported.append("freed")), reported


def cluster() -> LedgerAndReports:
    reported: list[str] = []
    made = Placement(lambda: reported.append("freed"))
    made.update((NodeState("a", "a", True, TOTAL, NOTHING),))
    made.alive["a"].is_ready = True
    return made, reported


@pytest.fixture(params=[machine, cluster])
def ledger_and_reports(request: pytest.FixtureRequest) -> LedgerAndReports:
    make: Callable[[], LedgerAndReports] = request.param
    return make()


def free(ledger: CapacityLedger) -> Capacity:
    (node,) = ledger.nodes()
    assert node.total == TOTAL
    assert node.is_ready
    return node.free


def test_a_reservation_lasts_until_it_is_released(ledger_and_reports: LedgerAndReports) -> None:
    ledger, _ = ledger_and_reports
    assert ledger.reserve("1", HALF) is None
    assert free(ledger) == Capacity(1000, 2 * GIB, 1)
    ledger.release("1")
    assert free(ledger) == TOTAL


def test_a_second_call_changes_nothing(ledger_and_reports: LedgerAndReports) -> None:
    ledger, reported = ledger_and_reports
    for _ in range(2):
        assert ledger.reserve("1", HALF) is None
        assert free(ledger) == Capacity(1000, 2 * GIB, 1)
    assert ledger.reserve("2", ALL) is not None
    for _ in range(2):
        ledger.release("1")
        assert free(ledger) == TOTAL
        assert reported == ["freed"]


def test_a_job_that_does_not_fit_reserves_nothing_and_the_reason_names_what_it_lacks(
    ledger_and_reports: LedgerAndReports,
) -> None:
    ledger, _ = ledger_and_reports
    assert ledger.reserve("1", HALF) is None
    reason = ledger.reserve("2", ALL)
    assert isinstance(reason, str)
    assert reason.startswith("needs 2 CPU, 1 free")
    assert "; needs 4 GiB, 2 GiB free" in reason
    assert "; needs 2 GPUs, 1 free" in reason
    assert free(ledger) == Capacity(1000, 2 * GIB, 1)


def test_freed_capacity_is_reported_once_and_only_where_a_job_was_refused(
    ledger_and_reports: LedgerAndReports,
) -> None:
    ledger, reported = ledger_and_reports
    assert ledger.reserve("1", HALF) is None
    ledger.release("1")
    assert reported == []
    assert ledger.reserve("1", ALL) is None
    assert ledger.reserve("2", HALF) is not None
    assert ledger.reserve("3", HALF) is not None
    ledger.release("none")
    assert reported == []
    ledger.release("1")
    assert reported == ["freed"]
    assert ledger.reserve("2", HALF) is None
    ledger.release("2")
    assert reported == ["freed"]


def test_a_job_that_no_node_could_ever_run_is_refused(ledger_and_reports: LedgerAndReports) -> None:
    ledger, _ = ledger_and_reports
    assert ledger.refusal(ALL) is None
    assert ledger.reserve("1", ALL) is None
    assert ledger.refusal(ALL) is None
    reason = ledger.refusal(Compute(gpu=8))
    assert reason is not None
    assert reason.startswith("needs 8 GPUs, ")
    assert ledger.refusal(Compute(node_labels={"zone": ("a",)})) is not None


def test_giving_back_leaves_the_report_of_freed_capacity_to_the_engine() -> None:
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


def test_each_missing_resource_is_named() -> None:
    assert lacking(HALF, TOTAL, "{} free") is None
    assert lacking(ALL, Capacity(500, -1, 1), "{} free") == (
        "needs 2 CPU, 0.5 free; needs 4 GiB, 0 B free; needs 2 GPUs, 1 free"
    )
    assert lacking(Compute(cpu_m=500, mem=None), Capacity(500, 0, 0), "{} free") is None
    assert amounts(HALF) == "1 CPU and 2 GiB and 1 GPU"
    assert amounts(Compute(cpu_m=500)) == "0.5 CPU"
