"""Writes the figures of results.json into docs/performance.md, between the two marks. The text
around them is written by hand. `make bench-pictures` runs it.
"""

from __future__ import annotations

from pathlib import Path

import figures
import targets
from figures import Results
from kinds import PICTURES

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- made by benchmarks/page.py -->\n", "<!-- end -->\n"


def measured(results: Results) -> str:
    """The generated part of the page."""
    lines = ["", ", ".join(f"{what} {value}" for what, value in results.about.items()) + ".", ""]
    lines += ["## Targets", "", *table(targets.HEAD, [v.cells for v in targets.verdicts(results)])]
    for picture, (title, members) in PICTURES.items():
        shown = [name for name in members if name in results.values]
        if shown:
            part = Results(
                values={name: results.values[name] for name in shown},
                failed={
                    figure: subjects
                    for figure, subjects in results.failed.items()
                    if any(figures.belongs_to(name, figure) for name in shown)
                },
            )
            lines += [f"## {title}", "", f"![{title}](performance/{picture}.png)", ""]
            lines += table(figures.HEAD, part.rows())
    return "\n".join(lines)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    rule = ["---"] * len(head)
    return [*(f"| {' | '.join(row)} |" for row in (head, rule, *rows)), ""]


def page(text: str, results: Results) -> str:
    """The page with its generated part replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{measured(results)}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), Results.load(RESULTS)))
