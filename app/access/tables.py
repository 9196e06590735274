"""The tables, as SQLAlchemy sees them.  `migrations/` creates them, and a test compares the two."""

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    false,
)

from app.access.limits import LIMIT_NAMES


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, stored in UTC without its zone: SQLite has no type that would store one."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC).replace(tzinfo=None) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value else None


metadata = MetaData()


def _limits() -> list[Column[int]]:
    """NULL leaves a limit to the next level: key, role, configuration."""
    return [Column(name, BigInteger) for name in LIMIT_NAMES]


roles = Table(
    "roles",
    metadata,
    Column("name", String(64), primary_key=True),
    *_limits(),
    Column("models", JSON),  # NULL allows all
    Column("load_models", Boolean, nullable=False),
    Column("manage_keys", Boolean, nullable=False),
    Column("system_messages", Boolean, nullable=False),
    Column("raw_logprobs", Boolean, nullable=False),
    Column("control_tokens", Boolean, nullable=False, server_default=false()),  # an older program does not name it
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("last_four", String(4), nullable=False),
    Column("previous_digest", LargeBinary),  # of the secret before the last rotation
    Column("previous_expires", UtcDateTime),
    Column("role", String(64), nullable=False),
    Column("owner", String(128)),
    *_limits(),
    Column("created", UtcDateTime, nullable=False, index=True),
    Column("expires", UtcDateTime),
    Column("revoked", UtcDateTime),
    Column("last_used", UtcDateTime),
)

usage_counters = Table(
    "usage_counters",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("month", String(7), primary_key=True),
    Column("used", BigInteger, nullable=False),
    Column("reserved", BigInteger, nullable=False),
)

reservations = Table(
    "reservations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("month", String(7), nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("expires", UtcDateTime, nullable=False, index=True),
)

inference_log = Table(
    "inference_log",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("created", UtcDateTime, nullable=False, index=True),
    Column("request_id", String(128), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("route", String(128), nullable=False),
    Column("model", String(256)),  # NULL: the request ended before its model was known
    Column("revision", String(256)),
    Column("adapter", String(256)),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("charged_tokens", BigInteger, nullable=False),
    Column("cached", Boolean, nullable=False),
    Column("finish_reason", String(32)),  # NULL: the generation did not end by itself
    Column("status", Integer, nullable=False),
    Column("first_token_ms", Float),
    Column("latency_ms", Float, nullable=False),
    Column("prompt", Text),
    Column("answer", Text),
    Index("ix_inference_log_key_id_created", "key_id", "created"),
)

completion_cache = Table(
    "completion_cache",
    metadata,
    Column("key", LargeBinary, primary_key=True),
    Column("answer", LargeBinary, nullable=False),
    Column("expires", UtcDateTime, nullable=False, index=True),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(160), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", String(256), nullable=False),
    Column("size", BigInteger),  # NULL: it is still being uploaded
    Column("batch_id", String(64), index=True),  # whose results it shows; NULL: its content is in file_chunks
    Column("holds_failed", Boolean),  # of those the failed ones
    Column("created", UtcDateTime, nullable=False),
    Column("expires", UtcDateTime, nullable=False, index=True),
    Index("ix_files_tenant_created", "tenant", "created"),
)

file_chunks = Table(
    "file_chunks",
    metadata,
    Column("file_id", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(160), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("labels", JSON),  # its metadata
    Column("status", String(16), nullable=False, index=True),
    Column("created", UtcDateTime, nullable=False),
    Column("expires", UtcDateTime, nullable=False),
    Column("started", UtcDateTime),
    Column("finalizing", UtcDateTime),
    Column("cancelling", UtcDateTime),
    Column("ended", UtcDateTime),
    Column("errors", JSON, nullable=False),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("model", String(255)),  # of the first response
    Column("input_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cached_tokens", BigInteger, nullable=False, server_default="0"),
    Column("output_tokens", BigInteger, nullable=False, server_default="0"),
    Column("reasoning_tokens", BigInteger, nullable=False, server_default="0"),
    Column("output_lifetime", Integer),  # seconds
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("owner", String(64)),  # the process that validates it
    Column("lease", UtcDateTime),
    Index("ix_batches_tenant_created", "tenant", "created"),
)

batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch_id", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("custom_id", String(512), nullable=False),
    Column("state", String(16), nullable=False),
    Column("request", LargeBinary),  # NULL once there is a result
    Column("result", LargeBinary),
    Column("attempts", Integer, nullable=False),
    Column("owner", String(64)),  # the process that answers it, until its lease ends
    Column("lease", UtcDateTime),
    Index("ix_batch_lines_state", "batch_id", "state", "number"),
)
