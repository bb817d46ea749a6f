"""The metrics of tasks, from the task's own client to the text that Prometheus reads."""

from __future__ import annotations

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cortex.operator.metrics import Metrics
from cortex.worker.job.metrics import MAX_SERIES, MetricsClient


def samples_of(*jobs: MetricsClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The samples of an API `iris` with these jobs, whose metrics are sent as JSON."""
    metrics = Metrics()
    for job in jobs:
        metrics.add_task_metrics("iris", json.loads(json.dumps(job.series())))
    text = metrics.text("local", None, []).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("cortex_task_")
    }


IRIS = (("api", "iris"),)


def test_counts_of_jobs_are_added_up() -> None:
    first, second = MetricsClient(), MetricsClient()
    first.increment("rows")
    first.increment("rows", 2.5)
    second.increment("rows", 10)
    assert samples_of(first, second) == {("cortex_task_rows_total", IRIS): 13.5}


def test_a_gauge_has_the_value_of_the_latest_job() -> None:
    first, second = MetricsClient(), MetricsClient()
    first.gauge("loss", 0.5)
    second.gauge("loss", 0.25)
    assert samples_of(first, second) == {("cortex_task_loss", IRIS): 0.25}


def test_observations_are_counted_and_summed() -> None:
    job = MetricsClient()
    job.histogram("batch_s", 1)
    job.histogram("batch_s", 3)
    name = "cortex_task_batch_s"
    assert samples_of(job, job) == {(f"{name}_count", IRIS): 4, (f"{name}_sum", IRIS): 8}


def test_tags_are_labels_and_the_api_stays_the_api() -> None:
    job = MetricsClient()
    job.increment(
        "rows", tags={"split": "train", "api": "forged", "__name__": "x", "1st-part": "a"}
    )
    labels = (("api", "iris"), ("name__", "x"), ("split", "train"), ("tag_1st_part", "a"))
    assert samples_of(job) == {("cortex_task_rows_total", labels): 1}


def test_invalid_names_become_valid_for_prometheus() -> None:
    job = MetricsClient()
    job.increment("rows read/s\n")
    job.increment("done_total")
    assert set(samples_of(job)) == {
        ("cortex_task_rows_read_s__total", IRIS),
        ("cortex_task_done_total", IRIS),
    }


def test_a_name_keeps_its_first_kind() -> None:
    first, second = MetricsClient(), MetricsClient()
    first.increment("rows")
    second.gauge("rows", 7)
    assert samples_of(first, second) == {("cortex_task_rows_total", IRIS): 1}


def test_an_invalid_value_or_name_is_refused_at_the_call() -> None:
    job = MetricsClient()
    with pytest.raises(ValueError, match="could not convert"):
        job.gauge("loss", "much")  # type: ignore[arg-type]  # as users do
    with pytest.raises(ValueError, match="cannot go down"):
        job.increment("rows", -1)
    with pytest.raises(TypeError, match="name of a metric is a string"):
        job.increment(7)  # type: ignore[arg-type]  # as users do
    job.gauge("loss", float("nan"))
    assert samples_of(job) == {}


def test_the_series_of_a_job_are_limited() -> None:
    job = MetricsClient()
    for number in range(MAX_SERIES + 50):
        job.increment(f"rows_{number}")
    job.increment("rows_0")
    samples = samples_of(job)
    assert len(samples) == MAX_SERIES
    assert samples["cortex_task_rows_0_total", IRIS] == 2


def test_forged_metrics_are_left_out() -> None:
    metrics = Metrics()
    forged: list[object] = [
        None,
        ["counter"],
        ["evil", "x", [], [1]],
        ["counter", 7, [], [1]],
        ["counter", "x", [], []],
        ["counter", "x", [], [1, 2]],
        ["counter", "x", [], ["1"]],
        ["counter", "x", {}, [1]],
        ["summary", "y", [["a"], 7], [1]],
    ]
    metrics.add_task_metrics("iris", forged)
    assert "cortex_task_" not in metrics.text("local", None, []).decode()
