"""The first schema: versions, APIs, jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_IN_PROGRESS = sa.text("state IN ('running', 'starting', 'waiting')")


def upgrade() -> None:
    op.create_table(
        "versions",
        sa.Column("api_id", sa.String(64), primary_key=True),
        sa.Column("api_name", sa.String(63), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("created_ns", sa.BigInteger, nullable=False),
    )
    op.create_index("versions_of_api", "versions", ["api_name", "created_ns"])
    op.create_table(
        "apis",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("endpoint", sa.String(255), nullable=False, unique=True),
        sa.Column("api_id", sa.String(64), sa.ForeignKey("versions.api_id"), nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("job_id", sa.String(64), nullable=False, unique=True),
        sa.Column("api_name", sa.String(63), nullable=False),
        sa.Column("api_id", sa.String(64), sa.ForeignKey("versions.api_id"), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("created_ns", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("wanted", sa.String(8), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("handle", sa.Text),
        sa.Column("start_ns", sa.BigInteger),
        sa.Column("end_ns", sa.BigInteger),
        sa.Column("exit_code", sa.Integer),
        sa.Column("message", sa.Text),
        sa.Column("result", sa.Text),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("idempotency_hash", sa.String(64)),
        sa.UniqueConstraint("api_name", "idempotency_key", name="jobs_idempotency"),
    )
    op.create_index("jobs_of_api", "jobs", ["api_name", "seq"])
    op.create_index(
        "jobs_in_progress",
        "jobs",
        ["seq"],
        sqlite_where=_IN_PROGRESS,
        postgresql_where=_IN_PROGRESS,
    )
