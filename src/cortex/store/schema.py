"""The tables. `migrations/` makes them; a test holds the two together."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from cortex.spec.lifecycle import IN_PROGRESS

metadata = MetaData()

versions = Table(
    "versions",
    metadata,
    Column("api_id", String(64), primary_key=True),
    Column("api_name", String(63), nullable=False),
    Column("spec", Text, nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Index("versions_of_api", "api_name", "created_ns"),
)

apis = Table(
    "apis",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("endpoint", String(255), nullable=False, unique=True),
    Column("api_id", String(64), ForeignKey("versions.api_id"), nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    # SQLite gives only INTEGER PRIMARY KEY a rowid of its own; there it holds 64 bits too.
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("job_id", String(64), nullable=False, unique=True),
    Column("api_name", String(63), nullable=False),
    Column("api_id", String(64), ForeignKey("versions.api_id"), nullable=False),
    Column("spec", Text, nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("wanted", String(8), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("handle", Text),
    Column("start_ns", BigInteger),
    Column("end_ns", BigInteger),
    Column("exit_code", Integer),
    Column("message", Text),
    Column("result", Text),
    Column("idempotency_key", String(255)),
    Column("idempotency_hash", String(64)),
    UniqueConstraint("api_name", "idempotency_key", name="jobs_idempotency"),
    Index("jobs_of_api", "api_name", "seq"),
)

_in_progress = text("state IN ({})".format(", ".join(f"'{s}'" for s in sorted(IN_PROGRESS))))
Index("jobs_in_progress", jobs.c.seq, sqlite_where=_in_progress, postgresql_where=_in_progress)
