"""What is counted of jobs, and how those in progress are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cortex.engines.base import Capacity, NodeInfo
from cortex.operator.dispatch.live_jobs import LiveJob
from cortex.operator.metrics import Metrics
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import State, Wanted

SPEC = JobSpec(job_id="1", api_name="a", api_id="1", config="{}", created_ns=10_000_000_000)
WAITS = JobRecord(1, SPEC, State.WAITING, Wanted.RUN, attempt=0, handle=None)
RUNS = replace(WAITS, state=State.RUNNING, attempt=1, start_ns=10_250_000_000)
OVER = replace(RUNS, state=State.SUCCEEDED, end_ns=12_250_000_000)


def values(
    metrics: Metrics, live: list[LiveJob] | None = None, nodes: Sequence[NodeInfo] = ()
) -> dict[str, Any]:
    """All that is told, by name and the labels' values."""
    text = metrics.text("local", live, nodes).decode()
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_job_is_counted_once_with_its_times() -> None:
    metrics = Metrics()
    for before, after in ((WAITS, RUNS), (RUNS, OVER), (OVER, OVER)):
        metrics.on_job_changed(before, after)
    seen = values(metrics)
    assert seen["cortex_jobs_ended_total a status_succeeded"] == 1
    assert (seen["cortex_job_wait_seconds_count a"], seen["cortex_job_wait_seconds_sum a"]) == (
        1,
        0.25,
    )
    assert (seen["cortex_job_run_seconds_count a"], seen["cortex_job_run_seconds_sum a"]) == (1, 2)


def test_a_job_that_was_over_before_its_start_was_told_has_waited_all_the_same() -> None:
    metrics = Metrics()
    metrics.on_job_changed(WAITS, OVER)
    assert values(metrics)["cortex_job_wait_seconds_sum a"] == 0.25


def test_one_that_never_ran_has_neither_waited_nor_run() -> None:
    metrics = Metrics()
    stopped = replace(WAITS, state=State.LOST, wanted=Wanted.STOP, end_ns=11_000_000_000)
    metrics.on_job_changed(WAITS, stopped)
    seen = values(metrics)
    assert seen["cortex_jobs_ended_total a status_stopped"] == 1
    assert not any(name.startswith(("cortex_job_wait", "cortex_job_run")) for name in seen)


def test_lost_attempts_are_counted_and_only_the_first_has_waited() -> None:
    metrics = Metrics()
    again = replace(WAITS, attempt=1, losses=1)
    for before, after in (
        (WAITS, RUNS),
        (RUNS, again),
        (again, replace(RUNS, attempt=2, losses=1, start_ns=20_000_000_000)),
    ):
        metrics.on_job_changed(before, after)
    seen = values(metrics)
    assert seen["cortex_attempts_lost_total a"] == 1
    assert (seen["cortex_job_wait_seconds_count a"], seen["cortex_job_wait_seconds_sum a"]) == (
        1,
        0.25,
    )


def test_a_clock_that_was_set_back_makes_no_time_negative() -> None:
    metrics = Metrics()
    metrics.on_job_changed(WAITS, replace(RUNS, start_ns=1))
    assert values(metrics)["cortex_job_wait_seconds_sum a"] == 0


def test_jobs_in_progress_are_told_by_what_they_do() -> None:
    live = [
        LiveJob(WAITS, lambda _: None),
        LiveJob(replace(WAITS, state=State.STARTING), lambda _: None),
        LiveJob(RUNS, lambda _: None),
        LiveJob(RUNS, lambda _: None, unreachable="its node does not answer"),
        LiveJob(
            replace(RUNS, wanted=Wanted.STOP),
            lambda _: None,
            unreachable="its node does not answer",
        ),
    ]
    seen = values(Metrics(), live)
    phases = {"pending": 2, "running": 1, "unknown": 1, "stopping": 1}
    assert {phase: seen[f"cortex_jobs a {phase}"] for phase in phases} == phases


def test_only_machines_that_are_ready_have_anything() -> None:
    total, free = Capacity(4000, 1 << 30, 2), Capacity(1500, 1 << 29, 1)
    nodes = [NodeInfo("a", True, total, free), NodeInfo("b", False, total, total, "it is away")]
    seen = values(Metrics(), [], nodes)
    assert (seen["cortex_nodes ready"], seen["cortex_nodes not_ready"]) == (1, 1)
    assert (seen["cortex_cpu_cores total"], seen["cortex_cpu_cores free"]) == (4, 1.5)
    assert (seen["cortex_memory_bytes total"], seen["cortex_memory_bytes free"]) == (
        1 << 30,
        1 << 29,
    )
    assert (seen["cortex_gpus total"], seen["cortex_gpus free"]) == (2, 1)


def test_one_that_does_not_drive_tells_of_itself_alone() -> None:
    seen = values(Metrics(), None)
    assert seen["cortex_operator_drives"] == 0
    assert not {"cortex_jobs", "cortex_nodes ready"} & seen.keys()
    assert values(Metrics(), [])["cortex_operator_drives"] == 1
