"""What an agent keeps for operators, and for how long."""

from __future__ import annotations

import time

import pytest

from cortex.engines.base import Waits
from cortex.ray_node.outbox import Entry, Outbox


def test_operators_that_say_hello_and_never_poll_leave_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    outbox = Outbox()
    for number in range(1000):
        session = outbox.subscribe()
        outbox.add(Entry(Waits("job", number, "for its environment")))
        now[0] += 6
    assert outbox.has(session)
    assert len(outbox._subscribers) <= 21
    assert len(outbox._entries) <= 21
    assert [entry.content for entry in outbox.since(999, 1)] == [
        Waits("job", 999, "for its environment")
    ]
