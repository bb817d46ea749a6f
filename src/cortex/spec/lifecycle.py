"""THE state machine of a job: two tables, and a description of each state.

A job has an *observed* state (`State`) and a *wanted* one (`Wanted`). Every change is an `Event`.
`TRANSITIONS` lists the observed states that accept an event, and the state to which it leads.
`SHOWN[state, wanted]` is the status that users see. The store applies an event by compare-and-set
on the current state, so a late event finds no row and changes nothing. Documentation and tests read
these same tables.
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
    """The observed state of a job; `ABOUT` describes each."""

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    LOST = "lost"


class Wanted(StrEnum):
    """What the user wants: that the job runs, or that it stops."""

    RUN = "run"
    STOP = "stop"


class Event(StrEnum):
    """What happens to a job."""

    CLAIM = "claim"  # the dispatcher is about to hand the job to an engine
    UNCLAIM = "unclaim"  # the attempt was fenced off before any code ran
    RETRY = "retry"  # the attempt was lost, and the API allows another one
    START = "start"  # an engine observed that the worker started
    STOP = "stop"  # the user stopped the job, or deleted its API
    SUCCEED = "succeed"
    FAIL = "fail"
    OUT_OF_MEMORY = "out_of_memory"
    TIME_OUT = "time_out"
    LOSE = "lose"  # the node was lost, the environment was not built, or the engine refused


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
    # A worker can end before its start was observed: its exit record has both times.
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


ABOUT: dict[State, str] = {
    State.WAITING: (
        "The job is stored, and no attempt is under way. The leader's dispatcher claims it when "
        "its environment is ready and the engine has free capacity. It ends here if it is stopped, "
        "if its deadline passes, or if it cannot be run. A crash of the operator loses nothing: "
        "the next leader reads the waiting jobs from the store."
    ),
    State.STARTING: (
        "The dispatcher has claimed the job for one attempt and hands it to an engine, which has "
        "not observed a start yet. The engine moves it on: it reports the start, the end, or that "
        "the attempt never started. After a crash of the operator, recovery looks for the start "
        "record `start.<attempt>`. If there is none, recovery creates it, so that the attempt can "
        "never start, and the job waits again."
    ),
    State.RUNNING: (
        "The worker has started. Its supervisor decides how it ends and writes the exit record, "
        "which the engine reports. After a crash of the operator both keep running, and recovery "
        "follows them or reads the exit record. If the node or the supervisor is lost, the attempt "
        "is lost: the job waits again if its API allows a retry, else it is lost."
    ),
    State.SUCCEEDED: "The worker exited with code 0.",
    State.FAILED: "The worker exited with another code, or a signal ended it.",
    State.OUT_OF_MEMORY: "The worker reached its memory limit and was killed.",
    State.TIMED_OUT: "The deadline passed while the job waited or ran.",
    State.CANCELLED: "The job was stopped while it waited. No worker had started.",
    State.LOST: (
        "The platform failed the job. Its last attempt was lost, its environment could not "
        "be built, or the engine refused it. A job that was stopped between its claim and its "
        "start ends here as well, and is shown as stopped."
    ),
}
"""For people: who moves a job out of a state, and what a crash does to a job in it."""


def sources(event: Event) -> frozenset[State]:
    """The states that accept an event, for the guard of the store."""
    return frozenset(state for state, taken in TRANSITIONS if taken is event)
