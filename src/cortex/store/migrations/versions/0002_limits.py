"""Indexes for limits and retention: waiting jobs by API, finished jobs by age, jobs by version."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_WAITING = sa.text("state = 'waiting'")
_FINISHED = sa.text("state NOT IN ('running', 'starting', 'waiting')")


def upgrade() -> None:
    op.add_column(
        "jobs", sa.Column("has_folder", sa.Boolean, nullable=False, server_default=sa.true())
    )
    op.create_index(
        "jobs_waiting",
        "jobs",
        ["api_name"],
        sqlite_where=_WAITING,
        postgresql_where=_WAITING,
    )
    op.create_index(
        "jobs_finished",
        "jobs",
        ["has_folder", "end_ns"],
        sqlite_where=_FINISHED,
        postgresql_where=_FINISHED,
    )
    op.create_index("jobs_of_version", "jobs", ["api_id"])
