"""Rows of the inference log without a model: those of requests that ended before their model was known."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_log = sa.table("inference_log", sa.column("model", sa.String))


def upgrade() -> None:
    with op.batch_alter_table("inference_log") as table:
        table.alter_column("model", existing_type=sa.String(256), nullable=True)
    op.execute(_log.update().where(_log.c.model == "").values(model=None))


def downgrade() -> None:
    op.execute(_log.update().where(_log.c.model.is_(None)).values(model=""))
    with op.batch_alter_table("inference_log") as table:
        table.alter_column("model", existing_type=sa.String(256), nullable=False)
