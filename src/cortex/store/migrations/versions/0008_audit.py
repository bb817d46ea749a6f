"""The audit."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("time_ns", sa.BigInteger, nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("actor", sa.Text),
        sa.Column("address", sa.Text),
        sa.Column("api_name", sa.Text),
        sa.Column("job_id", sa.Text),
        sa.Column("token", sa.Text),
        sa.Column("message", sa.Text),
        sa.Column("count", sa.Integer, nullable=False),
    )
    op.create_index("audit_by_action", "audit", ["action", "seq"])
