"""What an agent has seen, until whoever asks for it has it. Called by the agent.

Each operator that says hello hears all of it from then on, whatever others have heard: one that was
superseded may not know that yet, and would else take the news from the one that drives.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from cortex.engines.base import Observation
from cortex.engines.ray.messages import Lock

_FORGET_S = 120.0  # who has not asked for as long was killed, or says hello again


@dataclass
class _Listener:
    seq: int
    asked: float


class Outbox:
    """Numbered as it comes."""

    def __init__(self) -> None:
        self._kept: list[Observation | Lock] = []
        self._first = 0  # the number of the first that is kept
        self._listeners: dict[str, _Listener] = {}

    @property
    def end(self) -> int:
        """The number of what comes next."""
        return self._first + len(self._kept)

    def add(self, seen: Observation | Lock) -> None:
        self._kept.append(seen)

    def greet(self) -> str:
        """Somebody hears all from now on; the name under which it asks."""
        name = uuid.uuid4().hex
        self._listeners[name] = _Listener(self.end, time.monotonic())
        return name

    def knows(self, name: str) -> bool:
        """Whether all has been kept for this one; it is, for a while more."""
        if name in self._listeners:
            self._listeners[name].asked = time.monotonic()
        return name in self._listeners

    def heard(self, name: str, seq: int) -> None:
        """It has what was before this number."""
        self._listeners[name].seq = seq
        before = time.monotonic() - _FORGET_S
        self._listeners = {
            each: listener for each, listener in self._listeners.items() if listener.asked > before
        }
        least = min(listener.seq for listener in self._listeners.values())
        del self._kept[: max(0, least - self._first)]
        self._first = max(self._first, least)

    def since(self, seq: int) -> tuple[Observation | Lock, ...]:
        """All from this number on."""
        return tuple(self._kept[max(0, seq - self._first) :])
