"""The driver process reserves resources for the operator while Ray answers slowly."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cortex.engines.ray.messages import Reservation
from cortex.ray_node import driver, reservations


def test_pending_reservations_block_no_other_call(monkeypatch: pytest.MonkeyPatch) -> None:
    granted = threading.Event()

    def reserve(*_: object) -> tuple[int, ...]:
        assert granted.wait(60)
        return ()

    monkeypatch.setattr(reservations, "reserve", reserve)
    monkeypatch.setattr(reservations, "node_states", lambda: ())
    monkeypatch.setattr(reservations, "release", lambda name: None)

    async def main() -> None:
        made = driver.Driver("namespace", "")
        pending = [asyncio.create_task(made.reserve(each, 60)) for each in reservations_of(200)]
        await asyncio.sleep(0)
        try:
            assert await asyncio.wait_for(made.node_states(), 20) == ()
            await asyncio.wait_for(made.release("seat"), 20)
        finally:
            granted.set()
        assert await asyncio.gather(*pending) == [()] * len(pending)

    asyncio.run(main())


def test_a_reservation_that_times_out_before_its_turn_is_never_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    granted = threading.Event()
    reserved: set[str] = set()

    def reserve(reservation: Reservation, _: float) -> tuple[int, ...]:
        assert granted.wait(60)
        reserved.add(reservation.name)
        return ()

    monkeypatch.setattr(reservations, "reserve", reserve)

    async def main() -> None:
        made = driver.Driver("namespace", "")
        first = [asyncio.create_task(made.reserve(each, 60)) for each in reservations_of(64)]
        await asyncio.sleep(0)
        late = asyncio.create_task(made.reserve(Reservation("late", "node", {"CPU": 1}), 0.01))
        await asyncio.sleep(0)  # its timeout starts with the call
        await asyncio.sleep(0.02)
        granted.set()
        with pytest.raises(reservations.ReservationFailed):
            await late
        await asyncio.gather(*first)
        assert len(reserved) == 64

    asyncio.run(main())


def reservations_of(count: int) -> list[Reservation]:
    return [Reservation(f"reservation {number}", "node", {"CPU": 1}) for number in range(count)]
