"""What a monitoring system reads of an operator, in Prometheus' text format: its jobs, its engine, its process.
Told of jobs by the board; the route `/metrics` asks.

Each operator tells of itself: jobs and engine are told by the one that drives. What it counts begins anew
when it starts, as Prometheus expects it of a process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set

import prometheus_client as prometheus
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily as Gauges
from prometheus_client.registry import Collector

import cortex
from cortex.engines.base import NOTHING, NodeInfo
from cortex.operator.dispatch.live_jobs import LiveJob
from cortex.operator.http.views import shown
from cortex.operator.task_metrics import TaskMeasures
from cortex.spec.api import MILLI
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import FINAL, State, Status, Wanted

MEDIA_TYPE = prometheus.CONTENT_TYPE_PLAIN_0_0_4

# When each series began, which Prometheus does not ask for and would store as many series again.
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # the library types most of itself

_WAITS_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 60, 300, 1800, 3600)
_RUNS_S = (0.01, 0.1, 1, 10, 60, 300, 1800, 3600, 4 * 3600, 24 * 3600)
_NS = 1e9


class Metrics:
    """One per operator."""

    def __init__(self) -> None:
        counted = self._counted = CollectorRegistry()
        self._measures = TaskMeasures()
        self._apis: set[str] = set()  # which have series
        counted.register(self._measures)
        prometheus.ProcessCollector(registry=counted)
        self._ended = prometheus.Counter(
            "cortex_jobs_ended",
            "Jobs that reached a final status.",
            ("api", "status"),
            registry=counted,
        )
        self._lost = prometheus.Counter(
            "cortex_attempts_lost",
            "Attempts that were lost and are followed by another.",
            ("api",),
            registry=counted,
        )
        self._waits = prometheus.Histogram(
            "cortex_job_wait_seconds",
            "From a job's submit to the start of its first attempt.",
            ("api",),
            buckets=_WAITS_S,
            registry=counted,
        )
        self._runs = prometheus.Histogram(
            "cortex_job_run_seconds",
            "From the start of a job's last attempt to its end.",
            ("api",),
            buckets=_RUNS_S,
            registry=counted,
        )

    def changed(self, before: JobRecord, after: JobRecord) -> None:
        """A job was stored anew."""
        api = after.spec.api_name
        self._apis.add(api)
        if after.losses > before.losses:
            self._lost.labels(api).inc(after.losses - before.losses)
        if before.start_ns is None and after.start_ns is not None and after.losses == 0:
            self._waits.labels(api).observe(_seconds(after.spec.created_ns, after.start_ns))
        if before.state not in FINAL and after.state in FINAL:
            self._ended.labels(api, shown(after).value).inc()
            if after.start_ns is not None and after.end_ns is not None:
                self._runs.labels(api).observe(_seconds(after.start_ns, after.end_ns))

    def measured(self, api: str, told: Iterable[object]) -> None:
        """A job that has ended told what its task counted and measured."""
        self._apis.add(api)
        self._measures.add(api, told)

    def keep_only(self, apis: Set[str]) -> None:
        """Drop the series of all other APIs: they were deleted."""
        for api in self._apis - apis:
            for family in (self._ended, self._lost, self._waits, self._runs):
                family.remove_by_labels({"api": api})
            self._measures.forget(api)
        self._apis &= apis

    def text(self, engine: str, live: Iterable[LiveJob] | None, nodes: Sequence[NodeInfo]) -> bytes:
        """All of it, to be sent as `MEDIA_TYPE`. It may take long: run it in a thread.

        Args:
            engine: its name.
            live: the jobs in progress; None where this operator does not drive.
            nodes: what they run on.
        """
        what = [([cortex.__version__, engine], 1)]
        now = [
            _gauges("cortex_operator_info", "What it is.", ("version", "engine"), what),
            Gauges("cortex_operator_drives", "Whether it drives the jobs.", int(live is not None)),
        ]
        if live is not None:
            now += [_in_progress(live), *_capacity(nodes)]
        told = CollectorRegistry()
        told.register(_Now(now))
        return prometheus.generate_latest(told) + prometheus.generate_latest(self._counted)


class _Now(Collector):
    """What is known at this moment."""

    def __init__(self, told: list[Gauges]) -> None:
        self._told = told

    def collect(self) -> Iterator[Metric]:
        return iter(self._told)


def _in_progress(live: Iterable[LiveJob]) -> Gauges:
    jobs = Counter((each.record.spec.api_name, _phase(each)) for each in live)
    return _gauges("cortex_jobs", "Jobs in progress.", ("api", "phase"), sorted(jobs.items()))


def _phase(live: LiveJob) -> str:
    record = live.record
    if record.wanted is Wanted.STOP:
        return "stopping"
    if shown(record, live.unreachable) is Status.UNKNOWN:
        return "unknown"
    return "running" if record.state is State.RUNNING else "pending"


def _capacity(nodes: Sequence[NodeInfo]) -> Iterator[Gauges]:
    ready = [node for node in nodes if node.is_ready]
    by_state = [(["ready"], len(ready)), (["not_ready"], len(nodes) - len(ready))]
    yield _gauges("cortex_nodes", "Machines that jobs run on.", ("state",), by_state)
    total = sum((node.total for node in ready), NOTHING)
    free = sum((node.free for node in ready), NOTHING)
    for name, words, has, left in (
        ("cortex_cpu_cores", "CPU for jobs.", total.cpu_m / MILLI, free.cpu_m / MILLI),
        ("cortex_memory_bytes", "Memory for jobs.", total.mem, free.mem),
        ("cortex_gpus", "GPUs for jobs.", total.gpu, free.gpu),
    ):
        yield _gauges(name, words, ("of",), [(["total"], has), (["free"], left)])


def _gauges(
    name: str, words: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> Gauges:
    family = Gauges(name, words, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


def _seconds(begin_ns: int, end_ns: int) -> float:
    return max(0.0, (end_ns - begin_ns) / _NS)  # the clock may have been set back in between
