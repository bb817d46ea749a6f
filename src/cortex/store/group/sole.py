"""An operator that is alone on its store: it is elected as soon as it stands. It has the interface
of `OperatorGroup`. Made by `Store` for a database that no other operator can open.
"""

from __future__ import annotations

from typing import TypeVar

from cortex.store.group.election import LeaderCallbacks
from cortex.store.group.notifications import ChangeListener
from cortex.store.writer import Planned, Write, Writer

T = TypeVar("T")


class SoleOperator:
    """See `OperatorGroup` for each method."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._callbacks: LeaderCallbacks | None = None

    @property
    def is_joined(self) -> bool:
        """False: it has no row of its own."""
        return False

    def data_folder_ids(self) -> set[str]:
        """None: the database lies in its data folder."""
        return set()

    def join(
        self, data_folder_id: str, runs_on: str, address: str, instead_of: str | None = None
    ) -> None:
        """There is no group to join."""

    async def subscribe(self, listener: ChangeListener) -> None:
        """No other operator makes changes."""

    async def join_election(self, callbacks: LeaderCallbacks, lease_s: float) -> None:
        """Lead at once.

        Raises:
            StartupError: as `LeaderCallbacks.lead` does.
        """
        self._callbacks = callbacks
        await callbacks.lead()

    async def leave(self) -> None:
        """Step down."""
        if self._callbacks is not None:
            await self._callbacks.step_down()

    async def leader(self) -> str | None:
        """None: no other operator leads."""
        return None

    async def write_as_leader(self, write: Write[T] | Planned[T]) -> T:
        """Run a write of the leader."""
        return await self._writer.run(write)
