"""Writes the diagram and the tables of lifecycle.md from the tables that the code runs on: `make docs`.
A test fails while the page is not what this makes."""

from __future__ import annotations

from pathlib import Path

from cortex.spec.lifecycle import FINAL, SHOWN, TRANSITIONS, Event, State

PAGE = Path(__file__).with_name("lifecycle.md")
BEGIN, END = "<!-- made by lifecycle.py -->\n", "<!-- end -->\n"


def transitions() -> list[tuple[State, Event, State]]:
    """All of them, in the order in which the states and events are written down."""
    states, events = list(State), list(Event)
    found = [(source, event, target) for (source, event), target in TRANSITIONS.items()]
    return sorted(found, key=lambda t: (states.index(t[0]), events.index(t[1])))


def diagram() -> str:
    """Every transition, those between the same two states on one arrow."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for source, event, target in transitions():
        arrows.setdefault((source, target), []).append(event)
    lines = [f"    {a} --> {b}: {', '.join(events)}" for (a, b), events in arrows.items()]
    ends = [f"    {state} --> [*]" for state in State if state in FINAL]
    return "\n".join(
        ["```mermaid", "stateDiagram-v2", "    [*] --> waiting: submit", *lines, *ends, "```", ""]
    )


def tables() -> str:
    """Which event leads where, and what is shown."""
    taken = [f"| {source} | {event} | {target} |" for source, event, target in transitions()]
    shown = sorted(
        f"| {state} | {wanted} | {status} |" for (state, wanted), status in SHOWN.items()
    )
    return "\n".join(
        [
            "## Which event leads where", "",
            "| observed | event | then observed |", "| --- | --- | --- |", *taken, "",
            "`stop` on a job that an engine has already been told of changes what is wanted, not what is observed:",
            "its processes are still ending. What they end as is stored too, and no longer shown.", "",
            "## What is shown", "", "| observed | wanted | status |", "| --- | --- | --- |", *shown, "",
        ]
    )  # fmt: skip


def page(text: str) -> str:
    """The page with its made part made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{diagram()}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
