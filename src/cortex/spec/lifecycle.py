"""THE state machine of a job: two tables and nothing else.

A job has what was *observed* of it (`State`) and what is *wanted* (`Wanted`). Every change is an
`Event`; `TRANSITIONS` says from which observed state it is taken, and to which it leads. What a user
sees is `SHOWN[state, wanted]`. The store applies events by compare-and-set on the current state, so
an event that comes late finds no row and changes nothing. Docs and tests read these same tables.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The eight statuses of the contract."""

    RUNNING = "status_running"
    SUCCEEDED = "status_succeeded"
    WORKER_ERROR = "status_worker_error"
    WORKER_OOM = "status_worker_oom"
    TIMED_OUT = "status_timed_out"
    STOPPED = "status_stopped"
    UNEXPECTED_ERROR = "status_unexpected_error"
    UNKNOWN = "status_unknown"


class State(StrEnum):
    """What was observed of a job."""

    WAITING = "waiting"  # stored, no attempt to start it is under way
    STARTING = "starting"  # claimed: an engine was told, or is about to be, to start this attempt
    RUNNING = "running"  # its worker has started
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"  # stopped before a worker had started
    LOST = "lost"  # the platform failed it


class Wanted(StrEnum):
    """What its user wants of a job."""

    RUN = "run"
    STOP = "stop"


class Event(StrEnum):
    """What can happen to a job."""

    CLAIM = "claim"  # the dispatcher takes it, right before it tells an engine
    UNCLAIM = "unclaim"  # the attempt was fenced off before any code ran: it may be claimed again
    RETRY = "retry"  # the attempt was lost, and its API allows another
    START = "start"  # an engine saw its worker start
    STOP = "stop"  # the user stopped it, or deleted its API
    SUCCEED = "succeed"
    FAIL = "fail"
    OUT_OF_MEMORY = "out_of_memory"
    TIME_OUT = "time_out"
    LOSE = "lose"  # node lost, environment not built, engine refused


IN_PROGRESS = frozenset({State.WAITING, State.STARTING, State.RUNNING})
FINAL = frozenset(State) - IN_PROGRESS
CLAIMED = frozenset({State.STARTING, State.RUNNING})

_ENDINGS = {
    Event.SUCCEED: State.SUCCEEDED,
    Event.FAIL: State.FAILED,
    Event.OUT_OF_MEMORY: State.OUT_OF_MEMORY,
    Event.TIME_OUT: State.TIMED_OUT,
    Event.LOSE: State.LOST,
}

TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.WAITING, Event.CLAIM): State.STARTING,
    (State.WAITING, Event.TIME_OUT): State.TIMED_OUT,
    (State.WAITING, Event.LOSE): State.LOST,
    (State.WAITING, Event.STOP): State.CANCELLED,
    (State.STARTING, Event.UNCLAIM): State.WAITING,
    **{(state, Event.RETRY): State.WAITING for state in (State.STARTING, State.RUNNING)},
    (State.STARTING, Event.START): State.RUNNING,
    (State.STARTING, Event.STOP): State.STARTING,
    (State.RUNNING, Event.STOP): State.RUNNING,
    # A worker can end before its start was seen: its exit record tells both.
    **{(source, event): end for source in CLAIMED for event, end in _ENDINGS.items()},
}

SHOWN: dict[tuple[State, Wanted], Status] = {
    **{(state, Wanted.STOP): Status.STOPPED for state in State},
    (State.WAITING, Wanted.RUN): Status.RUNNING,
    (State.STARTING, Wanted.RUN): Status.RUNNING,
    (State.RUNNING, Wanted.RUN): Status.RUNNING,
    (State.SUCCEEDED, Wanted.RUN): Status.SUCCEEDED,
    (State.FAILED, Wanted.RUN): Status.WORKER_ERROR,
    (State.OUT_OF_MEMORY, Wanted.RUN): Status.WORKER_OOM,
    (State.TIMED_OUT, Wanted.RUN): Status.TIMED_OUT,
    (State.LOST, Wanted.RUN): Status.UNEXPECTED_ERROR,
}


def sources(event: Event) -> frozenset[State]:
    """The states from which an event is taken: what the store's guard compares with."""
    return frozenset(state for state, taken in TRANSITIONS if taken is event)
