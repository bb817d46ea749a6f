"""Long configs and results in a table of their own, and the bytes of each job's config."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_IS_WAITING = sa.text("state = 'waiting'")


def upgrade() -> None:
    op.add_column(
        "jobs", sa.Column("config_bytes", sa.BigInteger, nullable=False, server_default="0")
    )
    # Long texts of existing rows stay there. Only waiting jobs need their size, for the limit.
    op.execute("UPDATE jobs SET config_bytes = length(spec) WHERE state = 'waiting'")
    op.drop_index("jobs_waiting", "jobs")
    op.create_index(
        "jobs_waiting",
        "jobs",
        ["api_name", "config_bytes"],
        sqlite_where=_IS_WAITING,
        postgresql_where=_IS_WAITING,
    )
    op.create_table(
        "long_texts",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            sa.ForeignKey("jobs.seq", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("name", sa.String(8), primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
    )
