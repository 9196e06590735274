"""Roles, keys, quotas, the inference log and stored answers.

Written out and not taken from `tables.py`: that changes with the code, a revision never does.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_LIMITS = ("monthly_tokens", "requests_per_minute", "burst", "tokens_per_minute", "parallel_requests")


def upgrade() -> None:
    roles = op.create_table(
        "roles",
        sa.Column("name", sa.String(64), primary_key=True),
        *(sa.Column(name, sa.BigInteger) for name in _LIMITS),
        sa.Column("models", sa.JSON),
        sa.Column("load_models", sa.Boolean, nullable=False),
        sa.Column("manage_keys", sa.Boolean, nullable=False),
        sa.Column("system_messages", sa.Boolean, nullable=False),
        sa.Column("raw_logprobs", sa.Boolean, nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("last_four", sa.String(4), nullable=False),
        sa.Column("previous_digest", sa.LargeBinary),
        sa.Column("previous_expires", sa.DateTime),
        sa.Column("role", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(128)),
        *(sa.Column(name, sa.BigInteger) for name in _LIMITS),
        sa.Column("created", sa.DateTime, nullable=False, index=True),
        sa.Column("expires", sa.DateTime),
        sa.Column("revoked", sa.DateTime),
        sa.Column("last_used", sa.DateTime),
    )
    op.create_table(
        "usage_counters",
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("month", sa.String(7), primary_key=True),
        sa.Column("used", sa.BigInteger, nullable=False),
        sa.Column("reserved", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "reservations",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("month", sa.String(7), nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("expires", sa.DateTime, nullable=False, index=True),
    )
    op.create_table(
        "inference_log",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("created", sa.DateTime, nullable=False, index=True),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("route", sa.String(128), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("revision", sa.String(256)),
        sa.Column("adapter", sa.String(256)),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("charged_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached", sa.Boolean, nullable=False),
        sa.Column("finish_reason", sa.String(32)),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("first_token_ms", sa.Float),
        sa.Column("latency_ms", sa.Float, nullable=False),
        sa.Column("prompt", sa.Text),
        sa.Column("answer", sa.Text),
    )
    op.create_index("ix_inference_log_key_id_created", "inference_log", ["key_id", "created"])
    op.create_table(
        "completion_cache",
        sa.Column("key", sa.LargeBinary, primary_key=True),
        sa.Column("answer", sa.LargeBinary, nullable=False),
        sa.Column("expires", sa.DateTime, nullable=False, index=True),
    )
    op.bulk_insert(roles, _BUILT_IN)


def downgrade() -> None:
    tables = "completion_cache inference_log reservations usage_counters api_keys roles"
    for table in tables.split():
        op.drop_table(table)


def _role(name: str, limits: tuple[int | None, ...], *, may_manage: bool, may_send_all: bool) -> dict[str, object]:
    rights = {"load_models": may_manage, "manage_keys": may_manage}
    rights |= {"system_messages": may_send_all, "raw_logprobs": may_send_all}
    return {"name": name, **dict(zip(_LIMITS, limits, strict=True)), "models": sa.null(), **rights}


_BUILT_IN = [
    _role("admin", (0, None, None, None, None), may_manage=True, may_send_all=True),
    _role("standard", (None, None, None, None, 16), may_manage=False, may_send_all=True),
    _role("free", (100_000, 5, 5, 10_000, 2), may_manage=False, may_send_all=False),
]
