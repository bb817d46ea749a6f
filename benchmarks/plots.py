"""Draws a picture of each group of figures from the stored results: `make bench-pictures`. A bar
reaches to the median, a line passes through it, and whiskers reach from the minimum to the maximum.
Targets are red.

Run as `plots.py RESULTS FOLDER`, where matplotlib is installed.
"""

from __future__ import annotations

import io
import statistics
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from figures import Results, number
from kinds import KINDS, OURS, PEERS, PICTURES, SIZES, STORED
from targets import FLAT, TARGETS

_OURS, _PEER, _LIMIT, _TARGET = "#1f6feb", "#8b949e", "#d0d7de", "#cf222e"
_DPI = 110
_LOG_SCALE_RATIO = 40  # of the maximum to the minimum: beyond it a linear axis hides the minimum


def draw(results: Results, folder: Path) -> None:
    """Draw every picture whose figures were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    for picture, (_, members) in PICTURES.items():
        shown = [name for name in members if name in results.values]
        if not shown:
            continue
        if shown[0] in STORED:
            _lines(results, shown, folder / f"{picture}.png")
        else:
            _bars(results, shown, folder / f"{picture}.png")


def _bars(results: Results, names: list[str], path: Path) -> None:
    rows = [len(results.values[name]) + len(_bounds(results, name)) for name in names]
    figure, axes = plt.subplots(
        len(names), 1, figsize=(7.2, sum(0.3 * row + 0.8 for row in rows)),
        height_ratios=[0.3 * row + 0.2 for row in rows], squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, name in zip(axes[:, 0], names, strict=True):
        _bar_panel(results, name, axis)
    _write(figure, path)


def _bar_panel(results: Results, name: str, axis: Axes) -> None:
    kind, subjects, bounds = KINDS[name], results.values[name], _bounds(results, name)
    everything = [value for values in subjects.values() for value in values] + list(bounds.values())
    if max(everything) / min(everything) > _LOG_SCALE_RATIO:
        axis.set_xscale("log")
        axis.set_xlim(min(everything) / 2, max(everything) * 5)
    else:
        axis.set_xlim(0, max(everything) * 1.22)
    for row, (subject, values) in enumerate(subjects.items()):
        median = statistics.median(values)
        whiskers = [[median - min(values)], [max(values) - median]]
        axis.barh(
            row, median, 0.66, color=_colour(subject), xerr=whiskers,
            error_kw={"ecolor": "#24292f", "elinewidth": 1, "capsize": 3},
        )  # fmt: skip
        _add_label(axis, f"{number(median)} {kind.unit}", max(values), row)
    for row, value in enumerate(bounds.values(), len(subjects)):
        axis.plot([value], [row], marker="D", markersize=5, color=_TARGET)
        axis.plot([value, value], [-0.4, row], color=_TARGET, linestyle="--", linewidth=0.8)
        _add_label(axis, f"{number(value)} {kind.unit}", value, row)
    axis.set_yticks(range(len(subjects) + len(bounds)), [*subjects, *bounds])
    for label in axis.get_yticklabels()[len(subjects) :]:
        label.set_color(_TARGET)
    axis.set_ylim(len(subjects) + len(bounds) - 0.4, -0.6)
    better = "more is better" if kind.more_is_better else "less is better"
    axis.set_title(f"{kind.title} [{kind.unit}], {better}", loc="left", fontsize=9.5)


def _add_label(axis: Axes, text: str, x: float, y: float) -> None:
    axis.annotate(
        text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=8, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _bounds(results: Results, name: str) -> dict[str, float]:
    """The bounds of our targets, by their labels."""
    found = {}
    for target in TARGETS:
        if target.figure != name:
            continue
        sign = "≥" if target.is_minimum else "≤"
        if target.beside is None:
            found[f"target: {sign} {number(target.bound)}"] = target.bound
        elif beside := results.of(name, target.beside):
            words = f"target: {sign} {number(target.bound)} x {target.beside}"
            found[words] = target.bound * statistics.median(beside)
    return found


def _lines(results: Results, names: list[str], path: Path) -> None:
    columns = 2
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(7.6, 2.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        subjects = results.values[name]
        sizes = [SIZES[subject] for subject in subjects]
        medians = [statistics.median(values) for values in subjects.values()]
        whiskers = [
            [m - min(v) for m, v in zip(medians, subjects.values(), strict=True)],
            [max(v) - m for m, v in zip(medians, subjects.values(), strict=True)],
        ]
        axis.errorbar(sizes, medians, whiskers, color=_OURS, marker="o", capsize=3, linewidth=1.3)
        kind = KINDS[name]
        bound = medians[0] / FLAT if kind.more_is_better else medians[0] * FLAT
        axis.axhline(bound, color=_TARGET, linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.set_xticks(list(SIZES.values()), list(SIZES))
        axis.minorticks_off()
        axis.set_ylim(0, 1.2 * max(bound, *(max(values) for values in subjects.values())))
        axis.set_title(f"{kind.title} [{kind.unit}]", loc="left", fontsize=8)
    _write(figure, path)


def _colour(subject: str) -> str:
    if subject.startswith(OURS):
        return _OURS
    return _PEER if subject in PEERS else _LIMIT


def _write(figure: Figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DPI)
    plt.close(figure)
    # Few colours, and no time or version in the file: the same results make the same file.
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(48).save(path, optimize=True)


if __name__ == "__main__":
    draw(Results.load(Path(sys.argv[1])), Path(sys.argv[2]))
