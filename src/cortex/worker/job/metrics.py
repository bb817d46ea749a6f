"""The metrics client that a Task gets by `__init__(self, metrics_client)`, as in Cortex. Its values
are reported with the job's end, and the operator exports them in /metrics. Standard library alone:
it runs in the user's environment.
"""

from __future__ import annotations

from cortex.worker import standard

globals()["__builtins__"] = standard.BUILTINS

TYPE_CHECKING = False
if TYPE_CHECKING:
    Tags = dict[str, str]
    Series = tuple[str, str, tuple[tuple[str, str], ...]]

MAX_SERIES = 100
"""Per job. Further series are dropped."""


class MetricsClient:
    """The metrics of one job. The methods are those of Cortex's client of the same name."""

    def __init__(self) -> None:
        self._series: dict[Series, list[float]] = {}

    def gauge(self, metric: str, value: float, tags: Tags | None = None) -> None:
        """Set the value of a gauge. The last value counts.

        Raises:
            TypeError, ValueError: the name is not a string, or the value is not a number.
        """
        self._values("gauge", metric, tags)[:] = [float(value)]

    def increment(self, metric: str, value: float = 1, tags: Tags | None = None) -> None:
        """Increase a counter.

        Raises:
            TypeError, ValueError: the name is not a string, or the value is not a number >= 0.
        """
        if value < 0:
            raise ValueError(f"a count cannot go down; found {value}")
        values = self._values("counter", metric, tags)
        values[:] = [(values[0] if values else 0.0) + float(value)]

    def histogram(self, metric: str, value: float, tags: Tags | None = None) -> None:
        """Add an observation. The count and the sum of all observations are exported.

        Raises:
            TypeError, ValueError: the name is not a string, or the value is not a number.
        """
        values = self._values("summary", metric, tags)
        count, total = values or (0.0, 0.0)
        values[:] = [count + 1, total + float(value)]

    def series(self) -> list[object]:
        """All series: kind, name, tags and values of each."""
        return [[*series, values] for series, values in self._series.items() if values]

    def _values(self, kind: str, metric: str, tags: Tags | None) -> list[float]:
        if not isinstance(metric, str):
            raise TypeError(f"the name of a metric is a string; found {metric!r}")
        listed = tuple(sorted((str(key), str(value)) for key, value in (tags or {}).items()))
        series = (kind, metric, listed)
        if series not in self._series and len(self._series) >= MAX_SERIES:
            return []
        return self._series.setdefault(series, [])
