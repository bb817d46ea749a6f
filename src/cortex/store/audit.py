"""The audit in the database. The transaction of a change writes the entry about it.

Called by `Store`, and by the functions that change APIs, jobs and tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, or_, select

from cortex.spec.audit import Action, Actor, AuditEntry
from cortex.store.schema import audit

MAX_REFUSALS = 100_000
"""How many entries of refused requests are kept: anyone can cause them, without any token."""


@dataclass(frozen=True)
class AuditPage:
    """Some entries, newest first, and the cursor of the next page (None: this is the last page)."""

    entries: list[AuditEntry]
    next_cursor: int | None


def add(connection: Connection, entries: Iterable[AuditEntry]) -> None:
    """Add entries."""
    rows = [
        {"time_ns": entry.time_ns, "actor": entry.actor.name, **entry.facts()} for entry in entries
    ]
    if rows:
        connection.execute(insert(audit), rows)


def page(connection: Connection, limit: int, cursor: int | None) -> AuditPage:
    """The newest entries before a cursor."""
    query = select(audit).order_by(audit.c.seq.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(audit.c.seq < cursor)
    found = [
        AuditEntry(
            action=Action(row["action"]),
            actor=Actor(row["actor"], row["address"]),
            time_ns=row["time_ns"],
            api_name=row["api_name"],
            job_id=row["job_id"],
            token=row["token"],
            message=row["message"],
            count=row["count"],
            seq=row["seq"],
        )
        for row in connection.execute(query).mappings()
    ]
    entries = found[:limit]
    return AuditPage(entries, entries[-1].seq if len(found) > limit else None)


def remove(connection: Connection, before_ns: int | None) -> int:
    """Remove entries from before a time, and all but the newest refusals; how many were removed.

    Args:
        before_ns: None removes no entry for its age.
    """
    refusals = audit.c.action == Action.REFUSE
    newest = select(audit.c.seq).where(refusals).order_by(audit.c.seq.desc())
    last = connection.execute(newest.offset(MAX_REFUSALS).limit(1)).scalar()
    old = [] if before_ns is None else [audit.c.time_ns < before_ns]
    beyond = [] if last is None else [refusals & (audit.c.seq <= last)]
    if not old and not beyond:
        return 0
    return connection.execute(delete(audit).where(or_(*old, *beyond))).rowcount
