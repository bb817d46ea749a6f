"""What users' tasks count and measure, added up over their jobs: a part of `/metrics`. Owned by `metrics`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.registry import Collector

PREFIX = "cortex_task_"
MAX_SERIES = 5_000
"""Of all jobs: names and tags are the users' own, and each takes memory here and in who stores them."""
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "summary": ("_count", "_sum")}
_NO_NAME = re.compile(r"[^a-zA-Z0-9_]")

Labels = tuple[tuple[str, str], ...]


class TaskMeasures(Collector):
    """Counts and sums are added up; of a gauge the latest job's is shown."""

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}
        self._values: dict[str, dict[Labels, list[float]]] = {}
        self._number = 0

    def add(self, api: str, told: Iterable[object]) -> None:
        """Add what a job of this API has told, as `worker.measures` does; what is none of that is left out."""
        for each in told:
            match each:
                case [str(kind), str(name), list(tags), list(values)] if kind in _SUFFIXES:
                    self._add(api, kind, name, tags, values)

    def forget(self, api: str) -> None:
        """Drop what jobs of this API have told."""
        for series in self._values.values():
            for labels in [each for each in series if ("api", api) in each]:
                del series[labels]
                self._number -= 1

    def collect(self) -> Iterator[Metric]:
        for name, series in sorted(self._values.items()):
            kind = self._kinds[name]
            family = Metric(name, "Told by tasks.", kind)
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
        name = PREFIX + _NO_NAME.sub("_", name).removesuffix("_total")
        # Of two kinds under one name Prometheus would take neither.
        if self._kinds.setdefault(name, kind) != kind:
            return
        series = self._values.setdefault(name, {})
        labels = _labels(api, tags)
        before = series.get(labels)
        if before is None:
            if self._number >= MAX_SERIES:
                return
            self._number += 1
        if before is not None and kind != "gauge":
            numbers = [old + new for old, new in zip(before, numbers, strict=True)]
        series[labels] = numbers


def _labels(api: str, tags: list[object]) -> Labels:
    found = {}
    for tag in tags:
        match tag:
            case [str(key), str(value)]:
                found[_label(key)] = value
    return tuple(sorted({**found, "api": api}.items()))


def _label(key: str) -> str:
    """A name that Prometheus takes: those with two underscores in front are its own."""
    name = _NO_NAME.sub("_", key).lstrip("_")
    return name if name[:1].isalpha() else f"tag_{name}"
