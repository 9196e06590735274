"""Files and batches."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(160), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("filename", sa.String(256), nullable=False),
        sa.Column("size", sa.BigInteger),
        sa.Column("batch_id", sa.String(64), index=True),
        sa.Column("holds_failed", sa.Boolean),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("expires", sa.DateTime, nullable=False, index=True),
    )
    op.create_index("ix_files_tenant_created", "files", ["tenant", "created"])
    op.create_table(
        "file_chunks",
        sa.Column("file_id", sa.String(64), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(160), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("input_file_id", sa.String(64), nullable=False),
        sa.Column("completion_window", sa.String(16), nullable=False),
        sa.Column("labels", sa.JSON),
        sa.Column("status", sa.String(16), nullable=False, index=True),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("expires", sa.DateTime, nullable=False),
        sa.Column("started", sa.DateTime),
        sa.Column("finalizing", sa.DateTime),
        sa.Column("cancelling", sa.DateTime),
        sa.Column("ended", sa.DateTime),
        sa.Column("errors", sa.JSON, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("completed", sa.Integer, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False),
        sa.Column("output_file_id", sa.String(64)),
        sa.Column("error_file_id", sa.String(64)),
        sa.Column("owner", sa.String(64)),
        sa.Column("lease", sa.DateTime),
    )
    op.create_index("ix_batches_tenant_created", "batches", ["tenant", "created"])
    op.create_table(
        "batch_lines",
        sa.Column("batch_id", sa.String(64), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("custom_id", sa.String(512), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("request", sa.LargeBinary),
        sa.Column("result", sa.LargeBinary),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("owner", sa.String(64)),
        sa.Column("lease", sa.DateTime),
    )
    op.create_index("ix_batch_lines_state", "batch_lines", ["batch_id", "state", "number"])


def downgrade() -> None:
    for table in ("batch_lines", "batches", "file_chunks", "files"):
        op.drop_table(table)
