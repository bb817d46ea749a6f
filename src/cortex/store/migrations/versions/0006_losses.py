"""The number of a job's lost attempts that were retried."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("losses", sa.Integer, nullable=False, server_default="0"))
