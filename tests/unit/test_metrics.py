"""The metrics: which jobs, times, machines and operators they count."""

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
WAITING = JobRecord(1, SPEC, State.WAITING, Wanted.RUN, attempt=0, handle=None)
RUNNING = replace(WAITING, state=State.RUNNING, attempt=1, start_ns=10_250_000_000)
FINISHED = replace(RUNNING, state=State.SUCCEEDED, end_ns=12_250_000_000)


def values(
    metrics: Metrics, live: list[LiveJob] | None = None, nodes: Sequence[NodeInfo] = ()
) -> dict[str, Any]:
    """The value of each sample, by its name and the values of its labels."""
    text = metrics.text("local", live, nodes).decode()
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_finished_job_is_counted_once_with_its_times() -> None:
    metrics = Metrics()
    for before, after in ((WAITING, RUNNING), (RUNNING, FINISHED), (FINISHED, FINISHED)):
        metrics.on_job_changed(before, after)
    samples = values(metrics)
    assert samples["cortex_jobs_ended_total a status_succeeded"] == 1
    assert (
        samples["cortex_job_wait_seconds_count a"],
        samples["cortex_job_wait_seconds_sum a"],
    ) == (
        1,
        0.25,
    )
    assert (samples["cortex_job_run_seconds_count a"], samples["cortex_job_run_seconds_sum a"]) == (
        1,
        2,
    )


def test_a_job_whose_start_was_not_reported_before_its_end_has_a_waiting_time() -> None:
    metrics = Metrics()
    metrics.on_job_changed(WAITING, FINISHED)
    assert values(metrics)["cortex_job_wait_seconds_sum a"] == 0.25


def test_a_job_that_never_ran_has_no_waiting_time_and_no_running_time() -> None:
    metrics = Metrics()
    stopped = replace(WAITING, state=State.LOST, wanted=Wanted.STOP, end_ns=11_000_000_000)
    metrics.on_job_changed(WAITING, stopped)
    samples = values(metrics)
    assert samples["cortex_jobs_ended_total a status_stopped"] == 1
    assert not any(name.startswith(("cortex_job_wait", "cortex_job_run")) for name in samples)


def test_lost_attempts_are_counted_and_only_the_first_attempt_has_a_waiting_time() -> None:
    metrics = Metrics()
    waiting_again = replace(WAITING, attempt=1, losses=1)
    for before, after in (
        (WAITING, RUNNING),
        (RUNNING, waiting_again),
        (waiting_again, replace(RUNNING, attempt=2, losses=1, start_ns=20_000_000_000)),
    ):
        metrics.on_job_changed(before, after)
    samples = values(metrics)
    assert samples["cortex_attempts_lost_total a"] == 1
    assert (
        samples["cortex_job_wait_seconds_count a"],
        samples["cortex_job_wait_seconds_sum a"],
    ) == (
        1,
        0.25,
    )


def test_no_time_is_negative_after_the_clock_was_set_back() -> None:
    metrics = Metrics()
    metrics.on_job_changed(WAITING, replace(RUNNING, start_ns=1))
    assert values(metrics)["cortex_job_wait_seconds_sum a"] == 0


def test_jobs_in_progress_are_counted_by_phase() -> None:
    live = [
        LiveJob(WAITING, lambda _: None),
        LiveJob(replace(WAITING, state=State.STARTING), lambda _: None),
        LiveJob(RUNNING, lambda _: None),
        LiveJob(RUNNING, lambda _: None, unreachable="its node does not answer"),
        LiveJob(
            replace(RUNNING, wanted=Wanted.STOP),
            lambda _: None,
            unreachable="its node does not answer",
        ),
    ]
    samples = values(Metrics(), live)
    phases = {"pending": 2, "running": 1, "unknown": 1, "stopping": 1}
    assert {phase: samples[f"cortex_jobs a {phase}"] for phase in phases} == phases


def test_only_ready_nodes_count_as_capacity() -> None:
    total, free = Capacity(4000, 1 << 30, 2), Capacity(1500, 1 << 29, 1)
    nodes = [NodeInfo("a", True, total, free), NodeInfo("b", False, total, total, "it is away")]
    samples = values(Metrics(), [], nodes)
    assert (samples["cortex_nodes ready"], samples["cortex_nodes not_ready"]) == (1, 1)
    assert (samples["cortex_cpu_cores total"], samples["cortex_cpu_cores free"]) == (4, 1.5)
    assert (samples["cortex_memory_bytes total"], samples["cortex_memory_bytes free"]) == (
        1 << 30,
        1 << 29,
    )
    assert (samples["cortex_gpus total"], samples["cortex_gpus free"]) == (2, 1)


def test_an_operator_that_does_not_lead_reports_no_jobs_and_nodes() -> None:
    samples = values(Metrics(), None)
    assert samples["cortex_operator_drives"] == 0
    assert not {"cortex_jobs", "cortex_nodes ready"} & samples.keys()
    assert values(Metrics(), [])["cortex_operator_drives"] == 1
