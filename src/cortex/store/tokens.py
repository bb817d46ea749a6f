"""Tokens in the database. Called by `Store`."""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, delete, insert, select

from cortex.errors import Conflict, NotFound
from cortex.spec.times import now_ns
from cortex.spec.token import Scope, Token
from cortex.store.schema import tokens

_SCOPE = select(tokens.c.scope).where(tokens.c.digest == bindparam("digest"))


def create(connection: Connection, name: str, scope: Scope, digest: str) -> None:
    """Add a token.

    Raises:
        Conflict: there is one of that name.
    """
    if connection.execute(select(tokens.c.name).where(tokens.c.name == name)).first():
        raise Conflict(f"there is a token {name!r}; revoke it first, or choose another name")
    values = {"name": name, "scope": scope, "digest": digest, "created_ns": now_ns()}
    connection.execute(insert(tokens).values(values))


def revoke(connection: Connection, name: str) -> None:
    """Remove a token.

    Raises:
        NotFound: there is none of that name.
    """
    if connection.execute(delete(tokens).where(tokens.c.name == name)).rowcount == 0:
        raise NotFound(f"there is no token {name!r}; see `cortex token list`")


def listed(connection: Connection) -> list[Token]:
    """All tokens, by name."""
    rows = connection.execute(select(tokens).order_by(tokens.c.name)).mappings()
    return [
        Token(name=row["name"], scope=Scope(row["scope"]), created_ns=row["created_ns"])
        for row in rows
    ]


def scope(connection: Connection, digest: str) -> Scope | None:
    """What the token of a digest allows; None where there is none."""
    found = connection.execute(_SCOPE, {"digest": digest}).scalar()
    return None if found is None else Scope(found)
