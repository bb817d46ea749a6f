"""The tables. `migrations/` creates them; a test checks that both describe the same schema."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
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
    true,
)

from cortex.spec.lifecycle import IN_PROGRESS, State

REVISION = "0008"
"""The newest migration, which results in these tables."""

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
    # In SQLite only an INTEGER PRIMARY KEY is the rowid, which has 64 bits.
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
    Column("has_folder", Boolean, nullable=False, server_default=true()),
    Column("losses", Integer, nullable=False, server_default="0"),
    Column("config_bytes", BigInteger, nullable=False, server_default="0"),
    UniqueConstraint("api_name", "idempotency_key", name="jobs_idempotency"),
    Index("jobs_of_api", "api_name", "seq"),
    # Without it, deleting a version would scan all jobs for its foreign key.
    Index("jobs_of_version", "api_id"),
)

# Of `jobs.spec` the config, and `jobs.result`, where they are long: see `texts`.
long_texts = Table(
    "long_texts",
    metadata,
    Column(
        "seq",
        BigInteger().with_variant(Integer, "sqlite"),
        ForeignKey("jobs.seq", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("name", String(8), primary_key=True),
    Column("text", Text, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("scope", String(8), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("created_ns", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("time_ns", BigInteger, nullable=False),
    Column("action", String(16), nullable=False),
    Column("actor", Text),
    Column("address", Text),
    Column("api_name", Text),
    Column("job_id", Text),
    Column("token", Text),
    Column("message", Text),
    Column("count", Integer, nullable=False),
    Index("audit_by_action", "action", "seq"),
)

# The operators of a PostgreSQL database, one of which is the leader: see `group.member`.
operators = Table(
    "operators",
    metadata,
    Column("operator_id", String(64), primary_key=True),
    Column("place", String(64), nullable=False),
    Column("commits", BigInteger, nullable=False),
    Column("since_ns", BigInteger, nullable=False),
    Column("runs_on", String(64)),
    Column("address", Text),
    Column("term", BigInteger),
    Column("until_ns", BigInteger),
)

# The conditions of the partial indexes, as text with literals. A query must use the same condition,
# so that the planner can prove that the index applies.
_names = ", ".join(f"'{state}'" for state in sorted(IN_PROGRESS))
IS_IN_PROGRESS = text(f"state IN ({_names})")
IS_FINISHED = text(f"state NOT IN ({_names})")
IS_WAITING = text(f"state = '{State.WAITING}'")

Index("jobs_in_progress", jobs.c.seq, sqlite_where=IS_IN_PROGRESS, postgresql_where=IS_IN_PROGRESS)
Index(
    "jobs_finished",
    jobs.c.has_folder,
    jobs.c.end_ns,
    sqlite_where=IS_FINISHED,
    postgresql_where=IS_FINISHED,
)
Index(
    "jobs_waiting",
    jobs.c.api_name,
    jobs.c.config_bytes,  # so that counting and adding up read the index alone
    sqlite_where=IS_WAITING,
    postgresql_where=IS_WAITING,
)
