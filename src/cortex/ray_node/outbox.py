"""The observations of an agent, which it keeps until each operator has received them.

Each operator that says hello receives all observations from then on, whatever others have received.
A superseded operator may not know yet that it is one: it must not take observations away from the
leader.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from cortex.engines.base import Observation
from cortex.engines.ray.messages import Lock

# An operator that has not polled for so long was killed, or will say hello again.
_LISTENER_TIMEOUT_S = 120.0


@dataclass
class _Listener:
    seq: int
    last_poll: float


class Outbox:
    """The observations and lock files, numbered in the order of their arrival."""

    def __init__(self) -> None:
        self._entries: list[Observation | Lock] = []
        self._first = 0  # the number of the first entry of `_entries`
        self._listeners: dict[str, _Listener] = {}

    @property
    def end(self) -> int:
        """The number of the next entry."""
        return self._first + len(self._entries)

    def add(self, entry: Observation | Lock) -> None:
        self._entries.append(entry)

    def greet(self) -> str:
        """Add an operator, which receives all entries from now on.

        Returns:
            The name of its session.
        """
        name = uuid.uuid4().hex
        self._listeners[name] = _Listener(self.end, time.monotonic())
        return name

    def knows(self, name: str) -> bool:
        """Whether the session still exists. It then lasts for another `_LISTENER_TIMEOUT_S`."""
        if name in self._listeners:
            self._listeners[name].last_poll = time.monotonic()
        return name in self._listeners

    def heard(self, name: str, seq: int) -> None:
        """Acknowledge the entries before a number; drop those that every operator has received."""
        self._listeners[name].seq = seq
        oldest = time.monotonic() - _LISTENER_TIMEOUT_S
        self._listeners = {
            each: listener
            for each, listener in self._listeners.items()
            if listener.last_poll > oldest
        }
        received = min(listener.seq for listener in self._listeners.values())
        del self._entries[: max(0, received - self._first)]
        self._first = max(self._first, received)

    def since(self, seq: int) -> tuple[Observation | Lock, ...]:
        """The entries from a number on."""
        return tuple(self._entries[max(0, seq - self._first) :])
