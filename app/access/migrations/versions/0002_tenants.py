"""The right to send control tokens, and one id for the configured key.

A role that may send system messages may send control tokens too, as before; one that may not could write a system
message in token ids until now.

The configured key was known by the id in it where it had the form of our own keys, and as `admin` otherwise; now it is
`admin` always.  Rows of keys are never deleted, so an id without a row is such a key's.  What it used is added up under
the new id.  What is reserved stays where it is: a process of the version before may be about to release it.

Stored responses are deleted: their digests name tenants by texts that two tenants could share.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_CONFIGURED = "admin"

_roles = sa.table("roles", sa.column("system_messages", sa.Boolean), sa.column("control_tokens", sa.Boolean))
_keys = sa.table("api_keys", sa.column("id", sa.String))
_counters = sa.table(
    "usage_counters",
    sa.column("key_id", sa.String),
    sa.column("month", sa.String),
    sa.column("used", sa.BigInteger),
    sa.column("reserved", sa.BigInteger),
)
_log = sa.table("inference_log", sa.column("key_id", sa.String))
_cache = sa.table("completion_cache")


def upgrade() -> None:
    op.add_column("roles", sa.Column("control_tokens", sa.Boolean, nullable=False, server_default=sa.false()))
    op.execute(sa.update(_roles).values(control_tokens=_roles.c.system_messages))
    _move_used()
    op.execute(sa.update(_log).where(_without_row(_log.c.key_id)).values(key_id=_CONFIGURED))
    op.execute(sa.delete(_cache))


def downgrade() -> None:
    with op.batch_alter_table("roles") as batch:
        batch.drop_column("control_tokens")


def _without_row(key_id: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    return (key_id != _CONFIGURED) & ~sa.exists().where(_keys.c.id == key_id)


def _move_used() -> None:
    connection = op.get_bind()
    orphans = _without_row(_counters.c.key_id)
    months = sa.select(_counters.c.month, sa.func.sum(_counters.c.used)).where(orphans).group_by(_counters.c.month)
    for month, used in connection.execute(months).all():
        of_month = (_counters.c.key_id == _CONFIGURED) & (_counters.c.month == month)
        add = sa.update(_counters).where(of_month).values(used=_counters.c.used + int(used))
        if connection.execute(add).rowcount == 0:
            values = {"key_id": _CONFIGURED, "month": month, "used": int(used), "reserved": 0}
            connection.execute(sa.insert(_counters).values(values))
    connection.execute(sa.delete(_counters).where(orphans, _counters.c.reserved == 0))
    connection.execute(sa.update(_counters).where(orphans).values(used=0))
