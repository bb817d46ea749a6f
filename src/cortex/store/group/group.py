"""This operator among those that share its database: it joins them, hears of what they change, and stands
for driving. Made by `Store`; called by what settles an operator and what makes it one of several
(`operator.place`, `operator.others`, `operator.relay`).
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
from cortex.store.writer import Write, Writer

T = TypeVar("T")


class OperatorGroup:
    """`places` and `join` block, and are called before anybody is served; the others are called on the
    event loop and do not block it."""

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
        self._lease: Election | None = None
        self._changes: ChangeFeed | None = None

    @property
    def is_joined(self) -> bool:
        """Whether this operator has a row of its own, which each of its transactions writes."""
        return self._member is not None

    def places(self) -> set[str]:
        """The ids of the data folders that the database belongs with, as far as it knows any.

        Raises:
            StorageUnavailable: it does not answer.
        """
        query = select(operators.c.place)
        return read(self._reader, lambda c: set(c.execute(query).scalars()))

    def join(self, place: str, runs_on: str, address: str, instead_of: str | None = None) -> None:
        """Be one of the operators of a database that others can reach, before anything else is done
        with it but what `Store.joining` is for.

        Args:
            place: the id of the data folder, which the database belongs with from then on.
            runs_on: what jobs run on: all operators that are there have to say the same.
            address: the URL at which the other operators reach this one.
            instead_of: the id of a data folder that is lost for good, whose place this one takes.

        Raises:
            StartupError: the database belongs with another data folder, operators are there that run
                jobs elsewhere, or it does not answer.
        """
        joined = OperatorRow(self._id, place, runs_on, address)
        try:
            with self._engine.begin() as connection:
                joined.join(connection, instead_of)
        except DBAPIError as error:
            raise unusable(self._engine, error) from error
        self._member = self._writer.fence = joined

    async def listen(self, hearer: ChangeListener) -> None:
        """Hear of what other operators change, from now on; until `leave`."""
        self._changes = ChangeFeed(self._engine, self._name, hearer)
        await self._changes.open()

    async def campaign(self, candidate: LeaderCallbacks, lease_s: float) -> None:
        """Be the one that drives, as soon as no other is; until `leave`. When this returns somebody
        does.

        Args:
            lease_s: after so many seconds an operator that hangs is taken not to drive any more.

        Raises:
            StartupError: as `LeaderCallbacks.drive` does.
        """
        assert self._member is not None
        self._lease = Election(
            self._engine, self._name, self._member, self._writer, candidate, lease_s
        )
        await self._lease.open()

    async def leave(self) -> None:
        """Stop driving, and hear nothing more."""
        if self._lease is not None:
            await self._lease.close()
        if self._changes is not None:
            await self._changes.close()

    async def driver(self) -> str | None:
        """The address of the operator that drives, if it is another one.

        Raises:
            StorageUnavailable: the database does not answer.
        """
        found = await asyncio.to_thread(read, self._reader, member.driver)
        return None if found is None or found[0] == self._id else found[1]

    async def as_driver(self, write: Write[T]) -> T:
        """Run a write that is the driver's alone; called by `Store`.

        Raises:
            Superseded: another operator drives.
        """
        if self._member is None:
            return await self._writer.run(write)
        term = self._member.term
        if term is None:
            raise Superseded("another operator drives the jobs now")
        try:
            return await self._writer.run(write, term)
        except Superseded:
            if self._lease is not None:
                self._lease.superseded(term)
            raise
