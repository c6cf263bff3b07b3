"""Run by Alembic. The connection comes from `migrations.upgrade`; there is no ini file and no offline mode."""

from __future__ import annotations

from alembic import context

from pandastack.control.store import tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables.metadata,
    # SQLite cannot alter most things in place, so Alembic copies the table.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
