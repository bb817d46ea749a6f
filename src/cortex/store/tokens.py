"""Tokens in the database. Called by `Store`."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, RowMapping, bindparam, delete, insert, select

from cortex.errors import Conflict, NotFound
from cortex.spec.audit import Action, Actor, AuditEntry
from cortex.spec.times import now_ns
from cortex.spec.tokens import Scope, Token
from cortex.store import audit
from cortex.store.schema import tokens

_BY_DIGEST = select(tokens).where(tokens.c.digest == bindparam("digest"))


def create(connection: Connection, name: str, scope: Scope, digest: str, actor: Actor) -> None:
    """Add a token.

    Raises:
        Conflict: a token of that name exists.
    """
    if connection.execute(select(tokens.c.name).where(tokens.c.name == name)).first():
        raise Conflict(f"token {name!r} already exists; revoke it first, or choose another name")
    created_ns = now_ns()
    values = {"name": name, "scope": scope, "digest": digest, "created_ns": created_ns}
    connection.execute(insert(tokens).values(values))
    message = f"scope {scope.value}"
    entry = AuditEntry(Action.CREATE_TOKEN, actor, created_ns, token=name, message=message)
    audit.add(connection, [entry])


def revoke(connection: Connection, name: str, actor: Actor) -> None:
    """Remove a token.

    Raises:
        NotFound: there is no token of that name.
    """
    if connection.execute(delete(tokens).where(tokens.c.name == name)).rowcount == 0:
        raise NotFound(f"there is no token {name!r}; see `cortex token list`")
    audit.add(connection, [AuditEntry(Action.REVOKE_TOKEN, actor, now_ns(), token=name)])


def listed(connection: Connection) -> list[Token]:
    """All tokens, by name."""
    rows = connection.execute(select(tokens).order_by(tokens.c.name)).mappings()
    return [_token(row) for row in rows]


def of_digest(connection: Connection, digest: str) -> Token | None:
    """The token with this digest, or None."""
    row = connection.execute(_BY_DIGEST, {"digest": digest}).mappings().first()
    return None if row is None else _token(row)


def known(connection: Connection, digests: Collection[str]) -> set[str]:
    """The digests among these that belong to tokens."""
    query = select(tokens.c.digest).where(tokens.c.digest.in_(list(digests)))
    return set(connection.execute(query).scalars())


def _token(row: RowMapping) -> Token:
    return Token(name=row["name"], scope=Scope(row["scope"]), created_ns=row["created_ns"])
