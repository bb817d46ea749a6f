"""Retention in the database: finished jobs, their folders, and unused versions.

Called by `Store`; each function is one short read or write.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, bindparam, delete, exists, select, update

from cortex.store.schema import IS_FINISHED, apis, jobs, versions

_ENDED_BEFORE = (
    select(jobs.c.job_id)
    .where(IS_FINISHED, jobs.c.has_folder == bindparam("has_folder"))
    .where(jobs.c.end_ns < bindparam("before_ns"))
    .order_by(jobs.c.end_ns)
    .limit(bindparam("limit"))
)
_OF_API = select(jobs.c.seq).where(IS_FINISHED, jobs.c.api_name == bindparam("name"))
_FIRST_BEYOND = _OF_API.order_by(jobs.c.seq.desc()).limit(1).offset(bindparam("kept"))
_UP_TO = (
    select(jobs.c.job_id)
    .where(IS_FINISHED, jobs.c.api_name == bindparam("name"), jobs.c.seq <= bindparam("seq"))
    .limit(bindparam("limit"))
)


def with_folder(connection: Connection, before_ns: int, limit: int) -> list[str]:
    """Jobs that ended before a time and whose folder may still exist; the oldest end first."""
    values = {"has_folder": True, "before_ns": before_ns, "limit": limit}
    return list(connection.execute(_ENDED_BEFORE, values).scalars())


def ended(connection: Connection, before_ns: int, limit: int) -> list[str]:
    """Jobs that ended before a time; those without a folder first, then the oldest end first."""
    found: list[str] = []
    for has_folder in (False, True):
        values = {"has_folder": has_folder, "before_ns": before_ns, "limit": limit - len(found)}
        found += connection.execute(_ENDED_BEFORE, values).scalars()
    return found


def beyond(connection: Connection, kept: int, limit: int) -> list[str]:
    """Finished jobs that are not among the newest `kept` of their API."""
    found: list[str] = []
    for name in connection.execute(select(versions.c.api_name).distinct()).scalars().all():
        seq = connection.execute(_FIRST_BEYOND, {"name": name, "kept": kept}).scalar()
        if seq is not None and len(found) < limit:
            values = {"name": name, "seq": seq, "limit": limit - len(found)}
            found += connection.execute(_UP_TO, values).scalars()
    return found


def note_removed_folders(connection: Connection, job_ids: Iterable[str]) -> None:
    """Note that the folders of these jobs were removed."""
    connection.execute(
        update(jobs).where(jobs.c.job_id.in_(list(job_ids))).values(has_folder=False)
    )


def remove(connection: Connection, job_ids: Iterable[str]) -> None:
    """Remove finished jobs."""
    connection.execute(delete(jobs).where(IS_FINISHED, jobs.c.job_id.in_(list(job_ids))))


def remove_versions(connection: Connection, before_ns: int) -> list[str]:
    """Remove versions deployed before a time that no API and no job uses; their ids."""
    unused = (
        delete(versions)
        .where(versions.c.created_ns < before_ns)
        .where(~exists().where(apis.c.api_id == versions.c.api_id))
        .where(~exists().where(jobs.c.api_id == versions.c.api_id))
        .returning(versions.c.api_id)
    )
    return list(connection.execute(unused).scalars())
