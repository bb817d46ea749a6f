"""Writes the generated part of lifecycle.md from `cortex.spec.lifecycle`: `make docs`.

A test fails while the page differs from what this program writes.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from cortex.spec.lifecycle import ABOUT, FINAL, SHOWN, TRANSITIONS, Event, State

PAGE = Path(__file__).with_name("lifecycle.md")
BEGIN, END = "<!-- made by lifecycle.py -->\n", "<!-- end -->\n"


def transitions() -> list[tuple[State, Event, State]]:
    """All transitions, in the order in which the code lists the states and events."""
    states, events = list(State), list(Event)
    found = [(source, event, target) for (source, event), target in TRANSITIONS.items()]
    return sorted(found, key=lambda t: (states.index(t[0]), events.index(t[1])))


def diagram() -> str:
    """Every transition; those between the same two states share an arrow."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for source, event, target in transitions():
        arrows.setdefault((source, target), []).append(event)
    lines = [f"    {a} --> {b}: {', '.join(events)}" for (a, b), events in arrows.items()]
    ends = [f"    {state} --> [*]" for state in State if state in FINAL]
    return "\n".join(
        ["```mermaid", "stateDiagram-v2", "    [*] --> waiting: submit", *lines, *ends, "```", ""]
    )


def states() -> str:
    """A paragraph about each state."""
    names = {state: f"**{state}**" + (" (final)" if state in FINAL else "") for state in State}
    items = [f"- {names[state]}: {ABOUT[state]}" for state in State]
    filled = [textwrap.fill(item, 110, subsequent_indent="  ") for item in items]
    return "\n".join(["## The states", "", *filled, ""])


def tables() -> str:
    """Which event leads where, and which status is shown."""
    taken = [f"| {source} | {event} | {target} |" for source, event, target in transitions()]
    shown = sorted(
        f"| {state} | {wanted} | {status} |" for (state, wanted), status in SHOWN.items()
    )
    return "\n".join(
        [
            "## Transitions", "",
            "| observed | event | then observed |", "| --- | --- | --- |", *taken, "",
            "A `stop` of a starting or running job changes the wanted state, not the observed one:",
            "its processes are still ending. The store records their end, but the job stays shown",
            "as stopped.", "",
            "## The status that users see", "",
            "| observed | wanted | status |", "| --- | --- | --- |", *shown, "",
        ]
    )  # fmt: skip


def page(text: str) -> str:
    """The page with its generated part replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{diagram()}\n{states()}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
