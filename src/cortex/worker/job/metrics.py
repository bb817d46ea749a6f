"""What a Task counts and measures: the object that `__init__(self, metrics_client)` gets, as in Cortex. It is told with
the job's end, and the operator shows it in /metrics. Standard library alone: it runs in the user's environment.
"""

from __future__ import annotations

from cortex.worker import standard

globals()["__builtins__"] = standard.BUILTINS

TYPE_CHECKING = False
if TYPE_CHECKING:
    Tags = dict[str, str]
    Series = tuple[str, str, tuple[tuple[str, str], ...]]

MAX_SERIES = 100
"""Of one job: what it would have beyond is left out."""


class MetricsClient:
    """Counts and measures of one job; its methods are those of Cortex's client of that name."""

    def __init__(self) -> None:
        self._series: dict[Series, list[float]] = {}

    def gauge(self, metric: str, value: float, tags: Tags | None = None) -> None:
        """Set a value, which is shown as it was set last.

        Raises:
            TypeError, ValueError: the name is no text, or the value no number.
        """
        self._of("gauge", metric, tags)[:] = [float(value)]

    def increment(self, metric: str, value: float = 1, tags: Tags | None = None) -> None:
        """Count up.

        Raises:
            TypeError, ValueError: the name is no text, or the value no number that is at least 0.
        """
        if value < 0:
            raise ValueError(f"a count cannot go down; found {value}")
        values = self._of("counter", metric, tags)
        values[:] = [(values[0] if values else 0.0) + float(value)]

    def histogram(self, metric: str, value: float, tags: Tags | None = None) -> None:
        """Add an observation; the number of all and their sum are shown.

        Raises:
            TypeError, ValueError: the name is no text, or the value no number.
        """
        values = self._of("summary", metric, tags)
        count, total = values or (0.0, 0.0)
        values[:] = [count + 1, total + float(value)]

    def told(self) -> list[object]:
        """All of it: kind, name, tags and values of each."""
        return [[*series, values] for series, values in self._series.items() if values]

    def _of(self, kind: str, metric: str, tags: Tags | None) -> list[float]:
        if not isinstance(metric, str):
            raise TypeError(f"the name of a metric is a string; found {metric!r}")
        listed = tuple(sorted((str(key), str(value)) for key, value in (tags or {}).items()))
        series = (kind, metric, listed)
        if series not in self._series and len(self._series) >= MAX_SERIES:
            return []
        return self._series.setdefault(series, [])
