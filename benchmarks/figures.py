"""The figures: the values of each subject in each round, as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kinds import KINDS, OURS

_TITLE, _UNIT, _SUBJECTS = "title", "unit", "subjects"


@dataclass
class Results:
    """Values by figure and subject (us, a peer or a limit), with the machine and its versions."""

    about: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    """The error of each subject that failed, by figure, as `interleave` names it."""

    @classmethod
    def load(cls, path: Path) -> Results:
        content = json.loads(path.read_text())
        figures = content["figures"]
        return cls(
            content["about"],
            {name: figures[name][_SUBJECTS] for name in KINDS if name in figures},
            content.get("failed", {}),
        )

    def save(self, path: Path) -> None:
        """Write the results to a file, and keep others that it has: a long run may have parts."""
        earlier = Results.load(path) if path.exists() else Results()
        values = {**earlier.values, **self.values}
        failed = {**earlier.failed, **self.failed}
        content = {
            "about": {**earlier.about, **self.about},
            "figures": {
                name: {_TITLE: kind.title, _UNIT: kind.unit, _SUBJECTS: values[name]}
                for name, kind in KINDS.items()
                if name in values
            },
            "failed": {name: words for name, words in failed.items() if words},
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def add(self, figure: str, subject: str, value: float) -> None:
        self.values.setdefault(figure, {}).setdefault(subject, []).append(value)

    def fail(self, figure: str, subject: str, words: str) -> None:
        """Record a subject's error in place of its values: values of fewer rounds would mislead."""
        self.failed.setdefault(figure, {})[subject] = words
        for name, subjects in self.values.items():
            if belongs_to(name, figure):
                subjects.pop(subject, None)

    def of(self, figure: str, subject: str) -> list[float]:
        """The subject's values, one for each round; none where it was not measured."""
        return self.values.get(figure, {}).get(subject, [])

    def ratios(self, figure: str, subject: str, beside: str) -> list[float]:
        """A subject's values, each divided by another subject's value of the same round."""
        pairs = zip(self.of(figure, subject), self.of(figure, beside), strict=False)
        return [value / other for value, other in pairs]

    def rows(self) -> list[list[str]]:
        """Every figure of every subject, with the median ratio of our values to its values."""
        return [
            [
                f"{KINDS[figure].title} [{KINDS[figure].unit}]", subject,
                number(statistics.median(values)),
                f"{number(min(values))} … {number(max(values))}",
                self._beside(figure, subject),
            ]
            for figure, subjects in self.values.items()
            for subject, values in subjects.items()
        ] + [
            [KINDS[figure].title if figure in KINDS else figure, subject, "failed", words, ""]
            for figure, subjects in self.failed.items()
            for subject, words in subjects.items()
        ]  # fmt: skip

    def _beside(self, figure: str, subject: str) -> str:
        ratios = self.ratios(figure, OURS, subject)
        return "" if subject == OURS or not ratios else f"{statistics.median(ratios):.3g} x"


HEAD = ["figure", "of", "median", "min … max", "ours to it"]


def number(value: float) -> str:
    """A number with three significant digits, or without decimals from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def aligned(rows: list[list[str]]) -> str:
    """Rows as a table of text."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def belongs_to(name: str, figure: str) -> bool:
    """Whether `name` is this figure or a part of it, as `crowd-starts` is of `crowd`."""
    return name == figure or name.startswith(f"{figure}-")


Measured = float | Mapping[str, float]


class PeerFailed(Exception):
    """A peer cannot be measured; the message is its error."""


def interleave(
    results: Results,
    rounds: int,
    figure: str,
    subjects: Mapping[str, Callable[[], Measured]],
) -> None:
    """Measure all subjects once in every round: a disturbance of the machine then affects all.

    A subject gives one value, or several by the ending of the figure's name. The error of a peer is
    recorded, and that peer is not measured again.
    """
    failed = results.failed[figure] = {}
    for _ in range(rounds):
        for subject, measure in subjects.items():
            if subject in failed:
                continue
            try:
                measured = measure()
            except PeerFailed as error:
                results.fail(figure, subject, str(error))
                continue
            if isinstance(measured, Mapping):
                for ending, value in measured.items():
                    results.add(f"{figure}-{ending}", subject, value)
            else:
                results.add(figure, subject, measured)
