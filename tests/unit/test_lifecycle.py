"""The two tables of the life cycle are complete and consistent."""

from __future__ import annotations

import runpy
from pathlib import Path

from cortex.spec.lifecycle import (
    ABOUT,
    FINAL,
    IN_PROGRESS,
    SHOWN,
    TRANSITIONS,
    Event,
    State,
    Status,
    Wanted,
)

ROOT = Path(__file__).parents[2]


def test_every_state_is_described() -> None:
    assert set(ABOUT) == set(State)


def test_nothing_leaves_a_final_state() -> None:
    assert not [state for state, _ in TRANSITIONS if state in FINAL]


def test_every_state_is_reached_and_every_event_has_a_transition() -> None:
    assert set(TRANSITIONS.values()) | {State.WAITING} == set(State)
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_every_state_in_progress_can_end() -> None:
    for state in IN_PROGRESS:
        assert (state, Event.STOP) in TRANSITIONS
        assert TRANSITIONS[state, Event.LOSE] in FINAL


def test_a_stopped_job_is_shown_as_stopped_in_every_state() -> None:
    assert {SHOWN[state, Wanted.STOP] for state in State} == {Status.STOPPED}


def test_every_status_is_shown_but_unknown_which_is_never_stored() -> None:
    assert set(SHOWN.values()) == set(Status) - {Status.UNKNOWN}


def test_a_cancelled_job_was_always_stopped() -> None:
    missing = {(s, w) for s in State for w in Wanted} - set(SHOWN)
    assert missing == {(State.CANCELLED, Wanted.RUN)}


def test_the_page_is_made_from_the_tables_that_the_code_runs_on() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "lifecycle.py"))
    text = (ROOT / "docs" / "lifecycle.md").read_text()
    assert made["page"](text) == text, "run `make docs`"
