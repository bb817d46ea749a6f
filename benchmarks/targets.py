"""The targets, and whether the results meet them. `run` prints them, `page` shows them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from figures import Results, number
from kinds import ALL_CORES, ECHO, FEW, KINDS, MANY, OURS, STORED

FLAT = 1.3


@dataclass(frozen=True)
class Target:
    """A figure of one subject, by itself or as a ratio to another subject's in the same round."""

    text: str
    bound: float
    figure: str
    subject: str = OURS
    beside: str | None = None
    is_minimum: bool = False
    """Whether the bound is a minimum and not a maximum."""


@dataclass(frozen=True)
class Verdict:
    """A target, with its values in the rounds."""

    target: Target
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool:
        bound = self.target.bound
        return self.median >= bound if self.target.is_minimum else self.median <= bound

    @property
    def cells(self) -> list[str]:
        """The target, its bound, the median, the range, and whether the target is met."""
        target = self.target
        unit = KINDS[target.figure].unit if target.beside is None else "x"
        sign = "≥" if target.is_minimum else "≤"
        span = f"{number(min(self.values))} … {number(max(self.values))}"
        return [
            target.text,
            f"{sign} {number(target.bound)} {unit}",
            f"{number(self.median)} {unit}",
            span,
            "yes" if self.is_met else "**no**",
        ]


HEAD = ["target", "bound", "measured", "min … max", "met"]

TARGETS = [
    Target("no-op jobs/s, compared with RQ", 4, "end-to-end", beside="RQ", is_minimum=True),
    Target(
        "no-op jobs/s, compared with Ray Jobs",
        200, "end-to-end", beside="Ray Jobs", is_minimum=True,
    ),
    Target(
        "no-op jobs/s, compared with supervised forks on the same cores",
        0.4, "end-to-end", beside=ALL_CORES, is_minimum=True,
    ),
    Target("submit to first line, p50, idle", 3, "first-line-p50"),
    Target("submit to first line, p50, compared with RQ", 0.5, "first-line-p50", beside="RQ"),
    Target("stop to exit", 20, "stop"),
    Target(
        "submits/s, compared with the echo endpoint",
        0.5, "submit", beside=ECHO, is_minimum=True,
    ),
    Target("submits/s, compared with RQ behind FastAPI", 2, "submit", beside="RQ", is_minimum=True),
    Target("memory when idle, all processes", 120, "idle-memory"),
    Target("memory of each running job beyond its own process", 6, "crowd-memory"),
    *(
        Target(
            f"{KINDS[figure].title.lower()}: {MANY} compared with {FEW}",
            1 / FLAT if KINDS[figure].more_is_better else FLAT,
            figure, subject=MANY, beside=FEW, is_minimum=KINDS[figure].more_is_better,
        )
        for figure in STORED
    ),
]  # fmt: skip


def verdicts(results: Results) -> list[Verdict]:
    """The verdicts on all targets that have values."""
    found = []
    for target in TARGETS:
        if target.beside is None:
            values = results.of(target.figure, target.subject)
        else:
            values = results.ratios(target.figure, target.subject, target.beside)
        if values:
            found.append(Verdict(target, values))
    return found
