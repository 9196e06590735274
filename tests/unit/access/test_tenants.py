"""Whose sessions and responses a key uses: no name makes two different callers one tenant."""

from datetime import UTC, datetime
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from app.access.key_format import CONFIGURED_ID, digest_of, id_of, new_key
from app.access.key_verifier import KeyVerifier
from app.access.keys import KeyRecord, KeyWithRole
from app.access.limits import NOTHING_SAID
from app.access.roles import Role
from app.engine.base import EngineInfo
from app.engine.cache import cache_key
from app.requests import GenerationRequest
from app.types import Limits, Principal, Rights, Tenant

KEY, OTHER_KEY = new_key(), new_key()
ROLE = Role(name="standard", limits=NOTHING_SAID, rights=Rights())
INFO = EngineInfo(model="m", engine="echo", context_length=10)
NAMES = st.text(max_size=12) | st.sampled_from(
    ["", "admin", "configured", "program", "owner:a", "key:a", "owner:key:a", id_of(KEY) or "", f"key:{id_of(KEY)}"]
)
TENANTS = st.one_of(
    st.builds(Tenant.owner, NAMES),
    st.builds(Tenant.key, NAMES),
    st.just(Tenant.configured()),
    st.just(Tenant.program()),
)


class OneRow:
    """A database with one key in it."""

    def __init__(self, key: str, owner: str | None) -> None:
        none: dict[str, Any] = dict.fromkeys(("expires", "revoked", "last_used", "previous_expires"))
        record = KeyRecord(
            id=id_of(key) or "",
            last_four="",
            role="standard",
            owner=owner,
            limits=NOTHING_SAID,
            created=datetime.now(UTC),
            **none,
        )
        self.row = KeyWithRole(record=record, role=ROLE, digest=digest_of(key.encode()), previous_digest=None)

    async def find(self, key_id: str) -> KeyWithRole | None:
        return self.row if key_id == self.row.record.id else None

    async def read(self, name: str) -> Role:
        return ROLE


async def principal(key: str, *, owner: str | None = None, configured: str | None = None) -> Principal:
    """Return the caller that a key with this owner stands for, beside a configured key."""
    store: Any = OneRow(key, owner)
    verifier = KeyVerifier(store, store, Limits(), configured_key=configured)
    claim = verifier.claim(key.encode())
    assert claim is not None
    verified = await verifier.verify(claim)
    assert verified is not None
    return verified.principal


@example(Tenant.owner("key:abc"), Tenant.key("abc"))
@example(Tenant.owner("configured"), Tenant.configured())
@example(Tenant.owner(""), Tenant.key(""))
@given(TENANTS, TENANTS)
def test_two_tenants_never_share_a_text_a_key_of_the_cache_or_a_place_in_a_dictionary(mine: Tenant, other: Tenant):
    """Whatever owners and keys are called, also like each other's text form."""
    same = (mine.kind, mine.name) == (other.kind, other.name)
    keys = [
        cache_key(GenerationRequest(id="1", tenant=each, prompt_ids=(1,)), INFO, "unfiltered") for each in (mine, other)
    ]

    assert same == (mine == other)
    assert same == (str(mine) == str(other))
    assert same == (keys[0] == keys[1])
    assert same == (len({mine, other}) == 1)


@given(NAMES)
async def test_an_owner_is_never_a_key_nor_the_configured_one(name: str):
    """A key whose owner is called like another key, or like the configured one, is a tenant of its owner's name."""
    owned = (await principal(OTHER_KEY, owner=name)).tenant

    assert owned not in {
        (await principal(KEY)).tenant,
        (await principal("configured-key", configured="configured-key")).tenant,
    }
    assert owned == (Tenant.owner(name) if name else Tenant.key(id_of(OTHER_KEY) or ""))


def test_the_text_of_a_tenant_names_its_kind():
    assert ["owner:key:abc", "key:abc", "configured", "program"] == [
        str(each) for each in (Tenant.owner("key:abc"), Tenant.key("abc"), Tenant.configured(), Tenant.program())
    ]


async def test_the_configured_key_shares_nothing_with_a_row_of_its_id():
    """Not its counter, its rate limits or its sessions, also where the secret of the row is the configured key."""
    row = await principal(KEY)
    configured = await principal(KEY, configured=KEY)
    rotated = await principal(new_key(id_of(KEY)), configured=KEY)

    assert (id_of(KEY), id_of(KEY)) == (row.key_id, rotated.key_id)
    assert (CONFIGURED_ID, Tenant.configured()) == (configured.key_id, configured.tenant)
    assert row.tenant == rotated.tenant != configured.tenant


def test_no_key_of_the_database_has_the_id_of_the_configured_one():
    """Ids of rows have another length, and only keys of our own form get rows."""
    assert len(CONFIGURED_ID) != len(id_of(new_key()) or "")
    assert id_of(new_key(CONFIGURED_ID)) is None
