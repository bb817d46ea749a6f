"""Writes the diagram and the tables of lifecycle.md from the tables that the code uses: `make docs`.

A test fails if the page differs from the output of this program.
"""

from __future__ import annotations

from pathlib import Path

from cortex.spec.lifecycle import FINAL, SHOWN, TRANSITIONS, Event, State

PAGE = Path(__file__).with_name("lifecycle.md")
BEGIN, END = "<!-- made by lifecycle.py -->\n", "<!-- end -->\n"


def transitions() -> list[tuple[State, Event, State]]:
    """All transitions, in the order in which the states and events are defined."""
    states, events = list(State), list(Event)
    found = [(source, event, target) for (source, event), target in TRANSITIONS.items()]
    return sorted(found, key=lambda t: (states.index(t[0]), events.index(t[1])))


def diagram() -> str:
    """A diagram of every transition; one arrow has all events between two states."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for source, event, target in transitions():
        arrows.setdefault((source, target), []).append(event)
    lines = [f"    {a} --> {b}: {', '.join(events)}" for (a, b), events in arrows.items()]
    ends = [f"    {state} --> [*]" for state in State if state in FINAL]
    return "\n".join(
        ["```mermaid", "stateDiagram-v2", "    [*] --> waiting: submit", *lines, *ends, "```", ""]
    )


def tables() -> str:
    """The tables of the transitions and of the statuses."""
    taken = [f"| {source} | {event} | {target} |" for source, event, target in transitions()]
    shown = sorted(
        f"| {state} | {wanted} | {status} |" for (state, wanted), status in SHOWN.items()
    )
    return "\n".join(
        [
            "## Transitions", "",
            "| observed | event | then observed |", "| --- | --- | --- |", *taken, "",
            "`stop` on a job that an engine already has changes the wanted state, not the observed one: the job's",
            "processes are still ending. How they end is stored, and no longer shown.", "",
            "## The status that users see", "", "| observed | wanted | status |", "| --- | --- | --- |", *shown, "",
        ]
    )  # fmt: skip


def page(text: str) -> str:
    """The page with its generated part replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{diagram()}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
