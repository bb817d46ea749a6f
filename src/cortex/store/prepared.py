"""Statements that every job runs, compiled once for each kind of database.

SQLAlchemy's own execution costs several times what the statement itself costs in SQLite, and a job
needs three of them. Here SQLAlchemy generates the SQL, and the driver's cursor runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from sqlalchemy import ClauseElement, Connection, Dialect
from sqlalchemy.sql.compiler import SQLCompiler

from cortex.store import sqlite

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
        dialect = connection.dialect
        found = self._compiled.get(dialect.name)
        if found is None:
            found = self._compiled[dialect.name] = _compile(self._statement, dialect)
        sql, bind = found
        if dialect.name != "sqlite":  # a server's answer takes longer than SQLAlchemy's overhead
            return connection.exec_driver_sql(sql, bind(values)).first()
        return sqlite.first(connection, sql, bind(values))


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
