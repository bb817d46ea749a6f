"""Alembic's entry point: runs the migrations on the connection from `database.migrate`."""

from alembic import context

from cortex.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
