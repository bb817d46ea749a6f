"""This operator's row in the table `operators` of a PostgreSQL database.

Inserted by `OperatorGroup.join`. Every transaction first updates this operator's row. The row
serves three purposes:

- It counts the commits. After the connection was lost in the middle of a commit, the row shows
  whether the commit was made. `was_committed` reads the row with a lock, so it waits for a commit
  that is still under way.
- It keeps out an operator whose data folder was declared lost and which comes back later. Its row
  was deleted, and the operator does not insert it again.
- It is the fence between leaders. The leader's row has its term, and a new leader clears the terms
  of all other rows (`election`). The writer refuses a change that belongs to one term while the row
  has another term or none. Both update the same row, so the server makes one wait for the other:
  when a new leader reads the jobs, no transaction of the old leader is under way.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

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
from cortex.store.prepared import Prepared, Row, Statement, Value
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
# A missing row is inserted again, unless another data folder has replaced this operator's.
_is_known = exists().where(operators.c.operator_id == _columns["operator_id"])
_is_replaced = exists().where(operators.c.place != _columns["place"])
_insert = insert(operators).from_select(
    list(_columns),
    select().add_columns(*_columns.values()).where(or_(_is_known, not_(_is_replaced))),
)
_BEGIN = Prepared(
    _insert.on_conflict_do_update(
        index_elements=[operators.c.operator_id], set_={"commits": _insert.excluded.commits}
    ).returning(operators.c.term)
)
_COMMITS = select(operators.c.commits).where(operators.c.operator_id == bindparam("id"))
_OTHER_FOLDER = select(operators.c.place).where(
    operators.c.place != bindparam("place"), operators.c.place != bindparam("instead_of")
)
_IS_CONNECTED = (
    "EXISTS (SELECT 1 FROM pg_stat_activity "
    "WHERE application_name LIKE 'cortex ' || operator_id || ' %')"
)
_OTHER_RUNS_ON = text(
    "SELECT address FROM operators WHERE operator_id <> :id AND runs_on IS DISTINCT FROM :runs_on "
    f"AND {_IS_CONNECTED} LIMIT 1"
)
_STILL_CONNECTED = text(
    f"SELECT address FROM operators WHERE place = :instead_of AND {_IS_CONNECTED} LIMIT 1"
)
# An operator of the lost folder that reconnects at this moment waits, and then finds its row
# replaced.
_LOCK_TABLE = "LOCK TABLE operators IN SHARE ROW EXCLUSIVE MODE"
_DELETE_ROWS_OF = delete(operators).where(operators.c.place == bindparam("instead_of"))
_LEADER = select(operators.c.operator_id, operators.c.address).where(operators.c.term.is_not(None))
# An operator that lost its connection may come back and look up a commit, but not after a day.
_DELETE_OLD_ROWS = text(
    "DELETE FROM operators WHERE since_ns < :before_ns AND term IS NULL AND operator_id <> :id "
    f"AND NOT {_IS_CONNECTED}"
)
_DAY_NS = 86_400 * 10**9
_SESSION_END_TIMEOUT_S = 3  # a session ends shortly after its process
_RETRY_DELAY_S = 0.2


def session_name(operator_id: str) -> str:
    """The name of an operator's sessions, by which the other operators recognize it.

    The server cuts names at 63 bytes, so the id, which is unique, comes first.
    """
    return f"cortex {operator_id} pid {os.getpid()} on {socket.gethostname()}"[:63]


class OperatorRow:
    """The row, and a `CommitFence` of the writer, which calls `begin` and `was_committed`."""

    def __init__(self, operator_id: str, data_folder_id: str, runs_on: str, address: str) -> None:
        """
        Args:
            data_folder_id: of the data folder, which has the projects and the jobs' folders.
            runs_on: the machine or the engine that runs the jobs; the same for all operators that
                are connected at one time.
            address: the URL at which the other operators reach this one.
        """
        self.id = operator_id
        self.term: int | None = None
        """The term in which this operator leads, as far as it knows; None if it does not lead."""
        self._row: dict[str, Value] = {
            "id": operator_id,
            "place": data_folder_id,
            "runs_on": runs_on,
            "address": address,
            "since_ns": now_ns(),
        }
        self._commit_number = 0

    def join(self, connection: Connection, instead_of: str | None) -> None:
        """Insert the row.

        Args:
            instead_of: the id of a data folder that is lost for good and that this one replaces.

        Raises:
            StartupError: the database belongs to another data folder, or connected operators run
                jobs elsewhere.
        """
        lost = {"instead_of": instead_of or self._row["place"]}
        other_folder = connection.execute(_OTHER_FOLDER, {**self._row, **lost}).scalar()
        if other_folder is not None:
            raise StartupError(
                f"the database {shown(connection.engine.url)} belongs to another data folder, "
                f"{other_folder}, which has its projects and its jobs: start this operator on that "
                "folder, or on another database. If that folder is lost for good, add "
                f"--lost-folder {other_folder}: the jobs that ran there end, and the APIs must be "
                "deployed again unless --files has their projects."
            )
        if instead_of not in (None, self._row["place"]):
            self._replace(connection, lost)
        address = connection.execute(_OTHER_RUNS_ON, self._row).scalar()
        if address is not None:
            raise StartupError(
                f"the operator at {address} on the database {shown(connection.engine.url)} runs "
                "jobs on another machine, or on another engine. All operators on a database must "
                "run on one machine, or all use --engine ray with one cluster."
            )
        self.begin().run(connection)
        connection.execute(_DELETE_OLD_ROWS, {"id": self.id, "before_ns": now_ns() - _DAY_NS})

    def _replace(self, connection: Connection, lost: Mapping[str, object]) -> None:
        deadline = time.monotonic() + _SESSION_END_TIMEOUT_S
        while (address := connection.execute(_STILL_CONNECTED, lost).scalar()) is not None:
            connection.exec_driver_sql("SELECT pg_stat_clear_snapshot()")
            if time.monotonic() > deadline:
                raise StartupError(
                    f"the data folder {lost['instead_of']} is not lost: the operator at {address} "
                    "uses it. Stop that operator. If its machine is down, the database notices "
                    "within a minute: try again then."
                )
            time.sleep(_RETRY_DELAY_S)
        connection.exec_driver_sql(_LOCK_TABLE)
        connection.execute(_DELETE_ROWS_OF, lost)

    def begin(self) -> Statement[int | None]:
        """The first statement of a transaction: count the commit, and lock the row until the
        transaction ends.

        Its outcome is the term in which this operator leads, or None. It raises Superseded if the
        database now belongs to another data folder.
        """
        self._commit_number += 1
        return Statement(_BEGIN, {**self._row, "commits": self._commit_number}, self._term_in)

    def _term_in(self, _: Connection, row: Row | None) -> int | None:
        if row is None:
            raise Superseded(
                f"the data folder {self._row['place']} of this operator was declared lost "
                "(--lost-folder) and replaced while the operator was away. Stop this operator."
            )
        term: int | None = row[0]
        return term

    def was_committed(self, connection: Connection) -> bool:
        """Whether the transaction that `begin` was last called for was committed.

        Raises:
            DBAPIError: not known yet: the server does not answer, or that transaction is under way.
        """
        connection.exec_driver_sql("SET LOCAL lock_timeout = '2s'")
        commits = connection.execute(_COMMITS.with_for_update(), {"id": self.id}).scalar()
        return bool(commits == self._commit_number)


def leader(connection: Connection) -> tuple[str, str | None] | None:
    """The id and the address of the last leader; None if there never was one."""
    row = connection.execute(_LEADER).first()
    return None if row is None else (row.operator_id, row.address)
