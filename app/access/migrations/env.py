"""Alembic's environment: `db.py` hands over a connection that is inside a transaction and holds the lock."""

from alembic import context

from app.access.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite can change little of a table in place.
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
