"""Configs and results that are too long for a job's row.

Every change of a job writes its whole row again, and a list of jobs reads many rows. Called by
`submissions`, `transitions` and `Store`.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

from sqlalchemy import Connection, bindparam, insert, select

from cortex.spec.job import MAX_INLINE_BYTES, JobRecord
from cortex.store.prepared import Prepared
from cortex.store.schema import long_texts


class Name(StrEnum):
    """Which text of a job; a job has at most one of each."""

    CONFIG = "config"
    RESULT = "result"


_INSERT = Prepared(
    insert(long_texts)
    .values({name: bindparam(name) for name in ("seq", "name", "text")})
    .returning(long_texts.c.seq)
)
_TEXT = Prepared(
    select(long_texts.c.text).where(
        long_texts.c.seq == bindparam("seq"), long_texts.c.name == bindparam("name")
    )
)


def is_long(text: str | None) -> bool:
    """Whether a text is too long for the job's row."""
    return text is not None and len(text) > MAX_INLINE_BYTES


def write(connection: Connection, seq: int, name: Name, text: str) -> None:
    """Store a long text of a job that has none of this name yet."""
    _INSERT.first(connection, {"seq": seq, "name": name.value, "text": text})


def with_config(connection: Connection, job: JobRecord) -> JobRecord:
    """The job with its config, however long."""
    if job.spec.config is not None:
        return job
    return replace(
        job, spec=replace(job.spec, config=_read(connection, job.seq, Name.CONFIG) or "{}")
    )


def complete(connection: Connection, job: JobRecord) -> JobRecord:
    """The job with its config and its result, however long."""
    job = with_config(connection, job)
    if not job.has_result or job.result is not None:
        return job
    return replace(job, result=_read(connection, job.seq, Name.RESULT) or "null")


def _read(connection: Connection, seq: int, name: Name) -> str | None:
    row = _TEXT.first(connection, {"seq": seq, "name": name.value})
    return None if row is None else str(row[0])
