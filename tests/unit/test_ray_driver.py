"""What Ray's driver does for the operator, where Ray itself takes long."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cortex.engines.ray.messages import Reservation
from cortex.ray_node import driver, reservations


def test_seats_that_are_waited_for_hold_nothing_else_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given = threading.Event()

    def take(*_: object) -> tuple[int, ...]:
        assert given.wait(60)
        return ()

    monkeypatch.setattr(reservations, "reserve", take)
    monkeypatch.setattr(reservations, "node_states", lambda: ())
    monkeypatch.setattr(reservations, "let_go", lambda name: None)

    async def main() -> None:
        made = driver.Driver("namespace", "")
        taking = [asyncio.create_task(made.take_seat(seat, 60)) for seat in seats_of(200)]
        await asyncio.sleep(0)
        try:
            assert await asyncio.wait_for(made.look(), 20) == ()
            await asyncio.wait_for(made.let_go("seat"), 20)
        finally:
            given.set()
        assert await asyncio.gather(*taking) == [()] * len(taking)

    asyncio.run(main())


def test_a_seat_that_is_given_up_before_its_turn_comes_is_never_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = threading.Event()
    taken: set[str] = set()

    def take(seat: Reservation, _: float) -> tuple[int, ...]:
        assert given.wait(60)
        taken.add(seat.name)
        return ()

    monkeypatch.setattr(reservations, "reserve", take)

    async def main() -> None:
        made = driver.Driver("namespace", "")
        first = [asyncio.create_task(made.take_seat(each, 60)) for each in seats_of(64)]
        await asyncio.sleep(0)
        late = asyncio.create_task(made.take_seat(Reservation("late", "node", {"CPU": 1}), 0.01))
        await asyncio.sleep(0)  # its time runs from when it asks
        await asyncio.sleep(0.02)
        given.set()
        with pytest.raises(reservations.Taken):
            await late
        await asyncio.gather(*first)
        assert len(taken) == 64

    asyncio.run(main())


def seats_of(count: int) -> list[Reservation]:
    return [Reservation(f"seat {number}", "node", {"CPU": 1}) for number in range(count)]
