"""Metrics of an operator in Prometheus' text format: its jobs, its engine and its process.

The dispatcher reports changes of jobs; the route `/metrics` renders the text. Each operator reports
on itself, and the leader also on jobs and engine. Counters start at zero with the process, as
Prometheus expects.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set

import prometheus_client as prometheus
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

import cortex
from cortex.engines.base import NOTHING, NodeInfo
from cortex.operator.dispatch.live_jobs import LiveJob
from cortex.spec.job import JobRecord, shown_status
from cortex.spec.lifecycle import FINAL, State, Status, Wanted
from cortex.spec.quantities import MILLI

MEDIA_TYPE = prometheus.CONTENT_TYPE_PLAIN_0_0_4
MAX_TASK_SERIES = 5_000
"""Of all jobs together. Users choose the names and tags, and each series takes memory here and in
Prometheus."""

# The creation time of each series: Prometheus would store as many series again, and does not use
# them.
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # the library types most of itself

_WAIT_BUCKETS_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 60, 300, 1800, 3600)
_RUN_BUCKETS_S = (0.01, 0.1, 1, 10, 60, 300, 1800, 3600, 4 * 3600, 24 * 3600)
_NS_PER_S = 1e9
_TASK_PREFIX = "cortex_task_"
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "summary": ("_count", "_sum")}
_INVALID_CHARACTERS = re.compile(r"[^a-zA-Z0-9_]")


class Metrics:
    """The metrics of one operator."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._task_metrics = _TaskMetrics()
        self._apis: set[str] = set()  # those with series
        registry.register(self._task_metrics)
        prometheus.ProcessCollector(registry=registry)
        self._ended = prometheus.Counter(
            "cortex_jobs_ended",
            "Jobs that reached a final status.",
            ("api", "status"),
            registry=registry,
        )
        self._lost = prometheus.Counter(
            "cortex_attempts_lost",
            "Attempts that were lost and retried.",
            ("api",),
            registry=registry,
        )
        self._waits = prometheus.Histogram(
            "cortex_job_wait_seconds",
            "Time from a job's submit to the start of its first attempt.",
            ("api",),
            buckets=_WAIT_BUCKETS_S,
            registry=registry,
        )
        self._runs = prometheus.Histogram(
            "cortex_job_run_seconds",
            "Time from the start of a job's last attempt to its end.",
            ("api",),
            buckets=_RUN_BUCKETS_S,
            registry=registry,
        )

    def on_job_changed(self, before: JobRecord, after: JobRecord) -> None:
        """Count a change of a job."""
        api = after.spec.api_name
        self._apis.add(api)
        if after.losses > before.losses:
            self._lost.labels(api).inc(after.losses - before.losses)
        if before.start_ns is None and after.start_ns is not None and after.losses == 0:
            self._waits.labels(api).observe(_seconds(after.spec.created_ns, after.start_ns))
        if before.state not in FINAL and after.state in FINAL:
            self._ended.labels(api, shown_status(after).value).inc()
            if after.start_ns is not None and after.end_ns is not None:
                self._runs.labels(api).observe(_seconds(after.start_ns, after.end_ns))

    def add_task_metrics(self, api: str, measures: Iterable[object]) -> None:
        """Add what the task of an ended job counted and measured.

        Args:
            measures: in the format of `worker.job.metrics`, but not checked yet.
        """
        self._apis.add(api)
        self._task_metrics.add(api, measures)

    def drop_all_but(self, apis: Set[str]) -> None:
        """Drop the series of all other APIs, which were deleted."""
        for api in self._apis - apis:
            for family in (self._ended, self._lost, self._waits, self._runs):
                family.remove_by_labels({"api": api})
            self._task_metrics.drop(api)
        self._apis &= apis

    def text(self, engine: str, live: Iterable[LiveJob] | None, nodes: Sequence[NodeInfo]) -> bytes:
        """Render all metrics, as `MEDIA_TYPE`. It may take long: run it in a thread.

        Args:
            engine: the engine's name.
            live: the jobs in progress; None if this operator is not the leader.
            nodes: the machines that jobs run on.
        """
        gauges = [
            _gauge(
                "cortex_operator_info",
                "Version and engine of the operator.",
                ("version", "engine"),
                [([cortex.__version__, engine], 1)],
            ),
            GaugeMetricFamily(
                "cortex_operator_drives",
                "Whether the operator is the leader.",
                int(live is not None),
            ),
        ]
        if live is not None:
            gauges += [_jobs_in_progress(live), *_capacity(nodes)]
        current = CollectorRegistry()
        current.register(_Fixed(gauges))
        return prometheus.generate_latest(current) + prometheus.generate_latest(self._registry)


class _Fixed(Collector):
    """Collects given gauges."""

    def __init__(self, gauges: list[GaugeMetricFamily]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        return iter(self._gauges)


def _jobs_in_progress(live: Iterable[LiveJob]) -> GaugeMetricFamily:
    jobs = Counter((each.record.spec.api_name, _phase(each)) for each in live)
    return _gauge("cortex_jobs", "Jobs in progress.", ("api", "phase"), sorted(jobs.items()))


def _phase(live: LiveJob) -> str:
    record = live.record
    if record.wanted is Wanted.STOP:
        return "stopping"
    if shown_status(record, live.unreachable) is Status.UNKNOWN:
        return "unknown"
    return "running" if record.state is State.RUNNING else "pending"


def _capacity(nodes: Sequence[NodeInfo]) -> Iterator[GaugeMetricFamily]:
    ready = [node for node in nodes if node.is_ready]
    by_state = [(["ready"], len(ready)), (["not_ready"], len(nodes) - len(ready))]
    yield _gauge("cortex_nodes", "Machines that jobs run on.", ("state",), by_state)
    total = sum((node.total for node in ready), NOTHING)
    free = sum((node.free for node in ready), NOTHING)
    for name, help_text, of_total, of_free in (
        ("cortex_cpu_cores", "CPU for jobs.", total.cpu_m / MILLI, free.cpu_m / MILLI),
        ("cortex_memory_bytes", "Memory for jobs.", total.mem, free.mem),
        ("cortex_gpus", "GPUs for jobs.", total.gpu, free.gpu),
    ):
        yield _gauge(name, help_text, ("of",), [(["total"], of_total), (["free"], of_free)])


def _gauge(
    name: str, help_text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def _seconds(begin_ns: int, end_ns: int) -> float:
    return max(0.0, (end_ns - begin_ns) / _NS_PER_S)  # the clock may have been set back in between


_Labels = tuple[tuple[str, str], ...]


class _TaskMetrics(Collector):
    """What users' tasks count and measure, by API.

    Counters and summaries of all jobs are added up; a gauge has the value of the latest job.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}
        self._series: dict[str, dict[_Labels, list[float]]] = {}
        self._series_count = 0

    def add(self, api: str, measures: Iterable[object]) -> None:
        """Add the measures of a job. Malformed ones are left out: a job may forge its report."""
        for measure in measures:
            match measure:
                case [str(kind), str(name), list(tags), list(values)] if kind in _SUFFIXES:
                    self._add(api, kind, name, tags, values)

    def drop(self, api: str) -> None:
        """Drop the series of an API."""
        for series in self._series.values():
            for labels in [each for each in series if ("api", api) in each]:
                del series[labels]
                self._series_count -= 1

    def collect(self) -> Iterator[Metric]:
        for name, series in sorted(self._series.items()):
            kind = self._kinds[name]
            family = Metric(name, "Reported by tasks.", kind)
            for labels, values in sorted(series.items()):
                for suffix, value in zip(_SUFFIXES[kind], values, strict=True):
                    family.add_sample(name + suffix, dict(labels), value)
            yield family

    def _add(
        self, api: str, kind: str, name: str, tags: list[object], values: list[object]
    ) -> None:
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if len(numbers) != len(_SUFFIXES[kind]) or not all(map(math.isfinite, numbers)):
            return
        name = _TASK_PREFIX + _INVALID_CHARACTERS.sub("_", name).removesuffix("_total")
        # Prometheus rejects a text with two kinds under one name.
        if self._kinds.setdefault(name, kind) != kind:
            return
        series = self._series.setdefault(name, {})
        labels = _labels(api, tags)
        before = series.get(labels)
        if before is None:
            if self._series_count >= MAX_TASK_SERIES:
                return
            self._series_count += 1
        if before is not None and kind != "gauge":
            numbers = [old + new for old, new in zip(before, numbers, strict=True)]
        series[labels] = numbers


def _labels(api: str, tags: list[object]) -> _Labels:
    labels = {}
    for tag in tags:
        match tag:
            case [str(key), str(value)]:
                labels[_label_name(key)] = value
    return tuple(sorted({**labels, "api": api}.items()))


def _label_name(key: str) -> str:
    """A valid label name. Prometheus reserves names that begin with two underscores."""
    name = _INVALID_CHARACTERS.sub("_", key).lstrip("_")
    return name if name[:1].isalpha() else f"tag_{name}"
