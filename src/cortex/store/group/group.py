"""This operator as one of several on a PostgreSQL database.

It joins them, subscribes to their changes, and takes part in the election of the leader. Made by
`Store`; called by `operator.data_folder_id` and `operator.ha`.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from sqlalchemy import Engine, select
from sqlalchemy.exc import DBAPIError

from cortex.errors import Superseded
from cortex.store.database import read, reader, unusable
from cortex.store.group import member
from cortex.store.group.election import Election, LeaderCallbacks
from cortex.store.group.member import OperatorRow
from cortex.store.group.notifications import ChangeFeed, ChangeListener
from cortex.store.schema import operators
from cortex.store.writer import SUPERSEDED, Planned, Write, Writer

T = TypeVar("T")


class OperatorGroup:
    """All methods are called on the event loop.

    `data_folder_ids` and `join` block it, and are called before the operator serves requests. The
    others do not block it.
    """

    def __init__(self, engine: Engine, writer: Writer, operator_id: str, name: str) -> None:
        """
        Args:
            name: of this operator's sessions.
        """
        self._engine = engine
        self._reader = reader(engine)
        self._writer = writer
        self._id = operator_id
        self._name = name
        self._member: OperatorRow | None = None
        self._election: Election | None = None
        self._feed: ChangeFeed | None = None

    @property
    def is_joined(self) -> bool:
        """Whether this operator has a row, which each of its transactions updates."""
        return self._member is not None

    def data_folder_ids(self) -> set[str]:
        """The ids of the data folders that the database belongs to; empty before the first `join`.

        Raises:
            StorageUnavailable: the database does not answer.
        """
        query = select(operators.c.place)
        return read(self._reader, lambda c: set(c.execute(query).scalars()))

    def join(
        self, data_folder_id: str, runs_on: str, address: str, instead_of: str | None = None
    ) -> None:
        """Insert this operator's row. Comes before every other use of a shared database.

        The caller holds `Store.join_lock` where several operators may start at the same time.

        Args:
            data_folder_id: of the data folder, to which the database belongs from then on.
            runs_on: the machine or the engine that runs the jobs; the same for all operators that
                are connected at one time.
            address: the URL at which the other operators reach this one.
            instead_of: the id of a data folder that is lost for good and that this one replaces.

        Raises:
            StartupError: the database belongs to another data folder, connected operators run jobs
                elsewhere, or the database does not answer.
        """
        row = OperatorRow(self._id, data_folder_id, runs_on, address)
        try:
            with self._engine.begin() as connection:
                row.join(connection, instead_of)
        except DBAPIError as error:
            raise unusable(self._engine, error) from error
        self._member = self._writer.fence = row

    async def subscribe(self, listener: ChangeListener) -> None:
        """Call the listener for every change from now on, until `leave`."""
        self._feed = ChangeFeed(self._engine, self._name, listener)
        await self._feed.open()

    async def join_election(self, callbacks: LeaderCallbacks, lease_s: float) -> None:
        """Lead as soon as no other operator does, until `leave`; returns when there is a leader.

        Args:
            lease_s: a leader that does not renew its lease for this long is superseded.

        Raises:
            StartupError: `LeaderCallbacks.lead` raised it.
        """
        assert self._member is not None
        self._election = Election(
            self._engine, self._name, self._member, self._writer, callbacks, lease_s
        )
        await self._election.open()

    async def leave(self) -> None:
        """Leave the election, stepping down as the leader, and end the subscription."""
        if self._election is not None:
            await self._election.close()
        if self._feed is not None:
            await self._feed.close()

    async def leader(self) -> str | None:
        """The address of the last leader; None if that is this operator, or there never was one.

        Raises:
            StorageUnavailable: the database does not answer.
        """
        leader = await asyncio.to_thread(read, self._reader, member.leader)
        return None if leader is None or leader[0] == self._id else leader[1]

    async def write_as_leader(self, write: Write[T] | Planned[T]) -> T:
        """Run a write that only the leader may make. Called by `Store`.

        Raises:
            Superseded: another operator is the leader.
        """
        if self._member is None:
            return await self._writer.run(write)
        term = self._member.term
        if term is None:
            raise Superseded(SUPERSEDED)
        try:
            return await self._writer.run(write, term)
        except Superseded:
            if self._election is not None:
                self._election.on_superseded(term)
            raise
