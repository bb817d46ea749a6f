"""The events of a job, each with the values that the store records. The dispatcher makes them, and
the route that stops a job; `store.transitions` applies them. `spec.lifecycle` has the states that
accept each event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cortex.spec.lifecycle import Event
from cortex.store.prepared import Value


@dataclass(frozen=True, slots=True)
class Claim:
    """The job is going to be started.

    Attributes:
        attempt: the number that the store holds when it takes the event, as in all events: for a
            claim, that of the attempt before.
        handle: the engine recovers the attempt by it.
    """

    event: ClassVar = Event.CLAIM
    attempt: int
    handle: str

    def values(self) -> Mapping[str, Value]:
        """The values of the event's statement, as in each event."""
        return {"of_attempt": self.attempt, "handle": self.handle}


@dataclass(frozen=True, slots=True)
class Unclaim:
    """The attempt did not start, and the job waits again."""

    event: ClassVar = Event.UNCLAIM
    attempt: int

    def values(self) -> Mapping[str, Value]:
        return {"of_attempt": self.attempt}


@dataclass(frozen=True, slots=True)
class Start:
    """The job's code runs."""

    event: ClassVar = Event.START
    attempt: int
    start_ns: int

    def values(self) -> Mapping[str, Value]:
        return {"of_attempt": self.attempt, "start_ns": self.start_ns}


@dataclass(frozen=True, slots=True)
class Retry:
    """The attempt was lost, and the job waits for another; the message says so."""

    event: ClassVar = Event.RETRY
    attempt: int
    message: str

    def values(self) -> Mapping[str, Value]:
        return {"of_attempt": self.attempt, "message": as_text(self.message)}


@dataclass(frozen=True, slots=True)
class Stop:
    """A user stops the job, in whichever attempt."""

    event: ClassVar = Event.STOP
    end_ns: int
    message: str

    def values(self) -> Mapping[str, Value]:
        return {"end_ns": self.end_ns, "message": as_text(self.message)}


@dataclass(frozen=True, slots=True)
class End:
    """The attempt ended, and the job with it.

    Attributes:
        event: which end it is: SUCCEED, FAIL, OUT_OF_MEMORY, TIME_OUT or LOSE.
        start_ns: None where the start is stored already, or there was none.
        result: JSON text.
    """

    event: Event
    attempt: int
    end_ns: int
    message: str | None
    start_ns: int | None = None
    exit_code: int | None = None
    result: str | None = None

    def values(self) -> Mapping[str, Value]:
        return {
            "of_attempt": self.attempt,
            "start_ns": self.start_ns,
            "end_ns": self.end_ns,
            "message": as_text(self.message),
            "exit_code": self.exit_code,
            "result": self.result,
        }


JobEvent = Claim | Unclaim | Start | Retry | Stop | End


def as_text(message: str | None) -> str | None:
    """Escape lone surrogates: a task may write them, and no database accepts them."""
    return None if message is None else message.encode("utf-8", "backslashreplace").decode()
