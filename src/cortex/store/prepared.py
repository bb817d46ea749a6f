"""Statements that every job runs, compiled once for each kind of database.

SQLAlchemy's own execution costs several times what the statement itself costs in SQLite, and a job
needs three of them. Here SQLAlchemy generates the SQL, and the driver's cursor runs it.

A `Statement` is a write whose first step is known before the database is asked. On a server,
`run_all` sends many of them together: a round trip costs more than a statement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from sqlalchemy import ClauseElement, Connection, Dialect
from sqlalchemy.sql.compiler import SQLCompiler

from cortex.store import postgresql, sqlite

T = TypeVar("T")
Value = int | str | None
Row = Sequence[Any]
"""A row from the driver, whose values have no static types."""
_Values = Mapping[str, Value]
_Bind = Callable[[_Values], Sequence[Value] | _Values]


class Prepared:
    """One statement; its values are bound by name. Errors are raised as SQLAlchemy's."""

    def __init__(self, statement: ClauseElement) -> None:
        self._statement = statement
        self._compiled: dict[str, tuple[str, _Bind]] = {}

    def first(self, connection: Connection, values: _Values) -> Row | None:
        """Run the statement; its first row, or None."""
        sql, bound = self.bound(connection.dialect, values)
        if connection.dialect.name != "sqlite":  # a server's answer takes longer than SQLAlchemy
            return connection.exec_driver_sql(sql, bound).first()
        return sqlite.first(connection, sql, bound)

    def bound(self, dialect: Dialect, values: _Values) -> tuple[str, Sequence[Value] | _Values]:
        """The SQL and its values, for the driver."""
        found = self._compiled.get(dialect.name)
        if found is None:
            found = self._compiled[dialect.name] = _compile(self._statement, dialect)
        sql, bind = found
        return sql, bind(values)


@dataclass(frozen=True, slots=True)
class Statement(Generic[T]):
    """A write that begins with one statement.

    Attributes:
        finish: makes the outcome of the statement's first row. It may run further statements, which
            come after all those that were sent together with this one.
    """

    prepared: Prepared
    values: _Values
    finish: Callable[[Connection, Row | None], T]

    def run(self, connection: Connection) -> T:
        """Run it alone."""
        return self.finish(connection, self.prepared.first(connection, self.values))


def run_all(connection: Connection, statements: Sequence[Statement[Any]]) -> list[Any]:
    """Run statements in this order, on a server in one round trip; their outcomes. Errors are
    raised as SQLAlchemy's."""
    if connection.dialect.name == "sqlite":
        return [each.run(connection) for each in statements]
    bound = [each.prepared.bound(connection.dialect, each.values) for each in statements]
    rows = postgresql.first_of_each(connection, bound)
    return [each.finish(connection, row) for each, row in zip(statements, rows, strict=True)]


def _compile(statement: ClauseElement, dialect: Dialect) -> tuple[str, _Bind]:
    compiled = statement.compile(dialect=dialect)
    assert isinstance(compiled, SQLCompiler)
    names = compiled.positiontup
    # The statement's own constants; an enum as plain text, for drivers are slow to adapt an enum
    # member.
    constants = {
        name: bind.value.value if isinstance(bind.value, Enum) else bind.value
        for name, bind in compiled.binds.items()
        if not bind.required
    }

    def by_name(values: _Values) -> dict[str, Value]:
        return {**constants, **values}

    def by_position(values: _Values) -> tuple[Value, ...]:
        bound = by_name(values)
        return tuple([bound[name] for name in names or ()])

    return compiled.string, by_name if names is None else by_position
