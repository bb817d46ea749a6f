"""This operator among those of a PostgreSQL database: its row in `operators`. Opened by `OperatorGroup.join`.

Every transaction of an operator's first writes that row, which has three uses.

It counts the commits, so that after a connection was lost in the middle of one, the row tells whether
it was made. It is read with a lock, so it cannot be read while that commit may still be made.

It keeps out an operator whose data folder was given up for lost, and which comes back: its row is gone, and
not made again.

And it is the fence. Who drives has its term in its row; whoever takes over takes it out (`lease`).
What may be stored in one term alone is not stored where the row has another, or none. The server lets
the one wait for the other: so when a new driver reads the jobs, nothing of the old one's is under way.
"""

from __future__ import annotations

import os
import socket
import time

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Connection,
    String,
    bindparam,
    delete,
    exists,
    not_,
    or_,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import insert

from cortex.errors import StartupError, Superseded
from cortex.spec.times import now_ns
from cortex.store.schema import operators
from cortex.store.url import shown

_columns: dict[str, BindParameter[str] | BindParameter[int]] = {
    "operator_id": bindparam("id", type_=String),
    "place": bindparam("place", type_=String),
    "runs_on": bindparam("runs_on", type_=String),
    "address": bindparam("address", type_=String),
    "since_ns": bindparam("since_ns", type_=BigInteger),
    "commits": bindparam("commits", type_=BigInteger),
}
# A row that is gone is made again, but where another data folder has taken the place of this one.
_is_known = exists().where(operators.c.operator_id == _columns["operator_id"])
_is_given_up = exists().where(operators.c.place != _columns["place"])
_insert = insert(operators).from_select(
    list(_columns),
    select().add_columns(*_columns.values()).where(or_(_is_known, not_(_is_given_up))),
)
_ENTER = _insert.on_conflict_do_update(
    index_elements=[operators.c.operator_id], set_={"commits": _insert.excluded.commits}
).returning(operators.c.term)
_COMMITS = select(operators.c.commits).where(operators.c.operator_id == bindparam("id"))
_ELSEWHERE = select(operators.c.place).where(
    operators.c.place != bindparam("place"), operators.c.place != bindparam("instead_of")
)
_IS_THERE = (
    "EXISTS (SELECT 1 FROM pg_stat_activity "
    "WHERE application_name LIKE 'cortex ' || operator_id || ' %')"
)
_RUNS_ELSEWHERE = text(
    "SELECT address FROM operators WHERE operator_id <> :id AND runs_on IS DISTINCT FROM :runs_on "
    f"AND {_IS_THERE} LIMIT 1"
)
_IS_LEFT = text(f"SELECT address FROM operators WHERE place = :instead_of AND {_IS_THERE} LIMIT 1")
# An operator of it that comes back at this moment sees what took its place.
_ALONE = "LOCK TABLE operators IN SHARE ROW EXCLUSIVE MODE"
_REPLACE = delete(operators).where(operators.c.place == bindparam("instead_of"))
_DRIVER = select(operators.c.operator_id, operators.c.address).where(operators.c.term.is_not(None))
# Whoever is cut off for a while may come back and look a commit up: nobody is cut off for a day.
_FORGET = text(
    "DELETE FROM operators WHERE since_ns < :before_ns AND term IS NULL AND operator_id <> :id "
    f"AND NOT {_IS_THERE}"
)
_DAY_NS = 86_400 * 10**9
_PATIENCE_S = 3  # a session ends shortly after its process
_AGAIN_S = 0.2


def session_name(operator_id: str) -> str:
    """The name of an operator's sessions, by which others know it. The server cuts names at 63 bytes:
    what tells one from another comes first."""
    return f"cortex {operator_id} pid {os.getpid()} on {socket.gethostname()}"[:63]


class OperatorRow:
    """`enter` and `holds` are called by the thread that writes."""

    def __init__(self, operator_id: str, place: str, runs_on: str, address: str) -> None:
        """
        Args:
            place: the id of where projects and jobs are kept beside the database.
            runs_on: what jobs run on, which has to be the same for all operators at one time.
            address: the URL at which other operators reach this one.
        """
        self.id = operator_id
        self.term: int | None = None
        """That in which this operator drives, as far as it knows."""
        self._row = {
            "id": operator_id,
            "place": place,
            "runs_on": runs_on,
            "address": address,
            "since_ns": now_ns(),
        }
        self._number = 0

    def join(self, connection: Connection, instead_of: str | None) -> None:
        """Put the row there.

        Args:
            instead_of: the id of a place that is lost for good, if this operator's takes its own.

        Raises:
            StartupError: what belongs with the database is kept elsewhere, or jobs run elsewhere.
        """
        lost = {"instead_of": instead_of or self._row["place"]}
        elsewhere = connection.execute(_ELSEWHERE, {**self._row, **lost}).scalar()
        if elsewhere is not None:
            raise StartupError(
                f"the database {shown(connection.engine.url)} belongs with another data folder, "
                f"{elsewhere}, where its projects are and its jobs run: all its operators have to use "
                "that one, or start this one on another database. If that folder is lost for good, say "
                f"--lost-folder {elsewhere}: jobs that ran there end, and what is deployed has to be "
                "deployed again unless --files has it."
            )
        if instead_of not in (None, self._row["place"]):
            self._replace(connection, lost)
        found = connection.execute(_RUNS_ELSEWHERE, self._row).scalar()
        if found is not None:
            raise StartupError(
                f"the operator at {found} on the database {shown(connection.engine.url)} runs jobs on "
                "another machine, or on another engine. Operators that share a database run them in the "
                "same place: on one machine, or all with --engine ray on one cluster."
            )
        self.enter(connection)
        connection.execute(_FORGET, {"id": self.id, "before_ns": now_ns() - _DAY_NS})

    def _replace(self, connection: Connection, lost: dict[str, object]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while (found := connection.execute(_IS_LEFT, lost).scalar()) is not None:
            connection.exec_driver_sql("SELECT pg_stat_clear_snapshot()")
            if time.monotonic() > deadline:
                raise StartupError(
                    f"the data folder {lost['instead_of']} is not lost: the operator at {found} uses it. "
                    "Stop that one. Where its machine is gone, the database knows it after a minute."
                )
            time.sleep(_AGAIN_S)
        connection.exec_driver_sql(_ALONE)
        connection.execute(_REPLACE, lost)

    def enter(self, connection: Connection) -> int | None:
        """Begin a transaction; the term in which this operator drives, if it does.

        Raises:
            Superseded: its data folder is not the one that the database belongs with any more.
        """
        self._number += 1
        row = connection.execute(_ENTER, {**self._row, "commits": self._number}).first()
        if row is None:
            raise Superseded(
                f"the data folder {self._row['place']} of this operator was given up for lost while it "
                "was away, and another one took its place. Stop this operator."
            )
        term: int | None = row.term
        return term

    def holds(self, connection: Connection) -> bool:
        """Whether the transaction that was entered last was committed.

        Raises:
            DBAPIError: that cannot be told now: the server does not answer, or still has it under way.
        """
        connection.exec_driver_sql("SET LOCAL lock_timeout = '2s'")
        found = connection.execute(_COMMITS.with_for_update(), {"id": self.id}).scalar()
        return bool(found == self._number)


def driver(connection: Connection) -> tuple[str, str | None] | None:
    """The id and the address of the operator that drives, or did last; None where none ever has."""
    found = connection.execute(_DRIVER).first()
    return None if found is None else (found.operator_id, found.address)
