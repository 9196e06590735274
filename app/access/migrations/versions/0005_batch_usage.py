"""What batches used, and how long what they write is kept."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_COUNTS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")


def upgrade() -> None:
    with op.batch_alter_table("batches") as batches:
        batches.add_column(sa.Column("model", sa.String(255)))
        for name in _COUNTS:
            batches.add_column(sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
        batches.add_column(sa.Column("output_lifetime", sa.Integer))


def downgrade() -> None:
    with op.batch_alter_table("batches") as batches:
        for name in ("model", *_COUNTS, "output_lifetime"):
            batches.drop_column(name)
