"""The observations of an agent, which it keeps until each operator has received them.

Each operator that says hello receives all observations from then on, whatever others have received.
A superseded operator may not know yet that it is superseded: it must not take observations away
from the leader.
"""

from __future__ import annotations

import pickle
import time
import uuid
from dataclasses import dataclass
from itertools import islice

from cortex.engines.base import Observation
from cortex.engines.ray.messages import Checkpoint, Lock

# An operator that has not polled for so long was killed, or will say hello again.
_SUBSCRIBER_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Entry:
    """What the operators receive, and with it what the agent needs to send the rest of the log."""

    content: Observation | Lock | Checkpoint
    log_limit: int | None = None
    """For the end of an attempt: the `limits.log` of its version."""


@dataclass
class _Subscriber:
    seq: int
    last_poll: float


class Outbox:
    """The observations and lock files, numbered in the order of their arrival."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._first = 0  # the number of the first entry of `_entries`
        self._subscribers: dict[str, _Subscriber] = {}

    @property
    def end(self) -> int:
        """The number of the next entry."""
        return self._first + len(self._entries)

    def add(self, entry: Entry) -> None:
        self._entries.append(entry)

    def subscribe(self) -> str:
        """Add an operator, which receives all entries from now on.

        Returns:
            The name of its session.
        """
        name = uuid.uuid4().hex
        self._subscribers[name] = _Subscriber(self.end, time.monotonic())
        self._drop()  # an operator that says hello again and again may never poll
        return name

    def has(self, name: str) -> bool:
        """Whether a session exists."""
        return name in self._subscribers

    def renew(self, name: str) -> bool:
        """Extend a session by another `_SUBSCRIBER_TIMEOUT_S`; whether the session still exists."""
        if name in self._subscribers:
            self._subscribers[name].last_poll = time.monotonic()
        return name in self._subscribers

    def acknowledge(self, name: str, seq: int) -> None:
        """Note that an operator has received the entries before a number.

        Entries that every operator has received are dropped.
        """
        self._subscribers[name].seq = seq
        self._drop()

    def since(self, seq: int, max_bytes: int) -> list[Entry]:
        """The entries from a number on: as many as take about `max_bytes`, or one."""
        entries: list[Entry] = []
        left = max_bytes
        for entry in islice(self._entries, max(0, seq - self._first), None):
            left -= len(pickle.dumps(entry.content))
            if entries and left < 0:
                break
            entries.append(entry)
        return entries

    def _drop(self) -> None:
        oldest = time.monotonic() - _SUBSCRIBER_TIMEOUT_S
        self._subscribers = {
            each: subscriber
            for each, subscriber in self._subscribers.items()
            if subscriber.last_poll > oldest
        }
        received = min(subscriber.seq for subscriber in self._subscribers.values())
        del self._entries[: max(0, received - self._first)]
        self._first = max(self._first, received)
