"""`/metrics`: what an operator exports to Prometheus."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from operator_harness import PROBE, Operator, probe_yaml, until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(operator: Operator) -> Samples:
    """All samples of an operator, by name and labels."""
    answer = operator.http.get(f"{operator.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def test_ends_are_counted_by_status_with_wait_and_run_times(
    shared_operator: Operator,
) -> None:
    endpoint = shared_operator.deployed(probe_yaml("counted"), {"probe.py": PROBE})
    for _ in range(2):
        shared_operator.run(endpoint, config={"do": "say"})
    shared_operator.run(endpoint, config={"do": "fail", "message": "as asked"})
    samples = samples_of(shared_operator)
    ended = "cortex_jobs_ended_total"
    assert value(samples, ended, api="counted", status="status_succeeded") == 2
    assert value(samples, ended, api="counted", status="status_worker_error") == 1
    for name in ("cortex_job_wait_seconds", "cortex_job_run_seconds"):
        assert value(samples, f"{name}_count", api="counted") == 3
        assert (value(samples, f"{name}_sum", api="counted") or 0) > 0
    assert value(samples, "cortex_jobs", api="counted", phase="running") is None


MEASURING = """
class Task:
    def __init__(self, metrics_client):
        self.metrics = metrics_client

    def __call__(self, config):
        self.metrics.increment("rows", config["rows"], tags={"split": "train"})
        self.metrics.gauge("loss", 0.5)
        self.metrics.histogram("batch_s", 2)
        if config.get("fail"):
            raise ValueError("as asked")
"""


def test_measures_of_tasks_are_exported_even_if_the_task_fails(
    shared_operator: Operator,
) -> None:
    endpoint = shared_operator.deployed(probe_yaml("measured"), {"probe.py": MEASURING})
    shared_operator.run(endpoint, config={"rows": 3})
    shared_operator.run(endpoint, config={"rows": 4, "fail": True})
    samples = samples_of(shared_operator)
    assert value(samples, "cortex_task_rows_total", api="measured", split="train") == 7
    assert value(samples, "cortex_task_loss", api="measured") == 0.5
    assert value(samples, "cortex_task_batch_s_count", api="measured") == 2
    assert value(samples, "cortex_task_batch_s_sum", api="measured") == 4


def test_jobs_in_progress_are_exported_before_and_after_a_restart(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(
        probe_yaml("kept", "  limits: {max_running: 1}\n"), {"probe.py": PROBE}
    )
    asleep, waits = (
        own_operator.submit(endpoint, config={"do": "sleep", "s": 300}) for _ in range(2)
    )
    own_operator.await_log(endpoint, asleep, "asleep")

    def has_one_of_each() -> bool:
        samples = samples_of(own_operator)
        phases = [
            value(samples, "cortex_jobs", api="kept", phase=p) for p in ("running", "pending")
        ]
        return phases == [1, 1]

    until(has_one_of_each, "one job runs and one waits")
    own_operator.kill()
    own_operator.start()
    until(has_one_of_each, "one job runs and one waits")
    assert (
        value(
            samples_of(own_operator), "cortex_jobs_ended_total", api="kept", status="status_stopped"
        )
        is None
    )
    for job in (waits, asleep):
        assert own_operator.delete(f"{own_operator.url}/kept", job).status_code == 200
    until(
        lambda: (
            value(
                samples_of(own_operator),
                "cortex_jobs_ended_total",
                api="kept",
                status="status_stopped",
            )
            == 2
        ),
        "both ends are counted",
    )


def test_the_operator_exports_itself_and_its_capacity(own_operator: Operator) -> None:
    endpoint = own_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    before = samples_of(own_operator)
    info = own_operator.http.get(f"{own_operator.url}/-/info").json()
    labels = {"version": info["version"], "engine": "local"}
    assert value(before, "cortex_operator_info", **labels) == 1
    assert value(before, "cortex_operator_drives") == 1
    assert value(before, "cortex_nodes", state="ready") == 1
    assert value(before, "cortex_cpu_cores", of="total") == info["capacity"]["cpu"]
    assert value(before, "cortex_memory_bytes", of="total") == info["capacity"]["mem"]
    assert value(before, "cortex_gpus", of="total") == info["capacity"]["gpu"]
    assert (value(before, "process_resident_memory_bytes") or 0) > 0
    job = own_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    own_operator.await_log(endpoint, job, "asleep")
    free = value(samples_of(own_operator), "cortex_cpu_cores", of="free")
    assert free is not None
    assert free < info["capacity"]["cpu"]
