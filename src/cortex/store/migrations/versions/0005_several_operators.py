"""Several operators: their addresses, the leader's term and lease, notifications of changes."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

# The commit of a change sends its notification. The name of the session shows which operator made
# it.
_TELL = """
CREATE FUNCTION cortex_tell_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('cortex_jobs', NEW.job_id || ' ' || current_setting('application_name'));
    RETURN NULL;
END $$;
CREATE TRIGGER cortex_tell AFTER INSERT OR UPDATE OF state, wanted ON jobs
    FOR EACH ROW EXECUTE FUNCTION cortex_tell_job();
CREATE FUNCTION cortex_tell_apis() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('cortex_apis', '');
    RETURN NULL;
END $$;
CREATE TRIGGER cortex_tell AFTER INSERT OR UPDATE OR DELETE ON apis
    FOR EACH STATEMENT EXECUTE FUNCTION cortex_tell_apis();
"""


def upgrade() -> None:
    op.add_column("operators", sa.Column("runs_on", sa.String(64)))
    op.add_column("operators", sa.Column("address", sa.Text))
    op.add_column("operators", sa.Column("term", sa.BigInteger))
    op.add_column("operators", sa.Column("until_ns", sa.BigInteger))
    if op.get_bind().dialect.name == "postgresql":
        op.execute(_TELL)
