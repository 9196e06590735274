"""What is remembered of keys, and for how long, while the database is there, away or slow."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from app.access import authenticator as key_ring
from app.access.authenticator import FRESH_SECONDS, RENEW_SECONDS, STALE_SECONDS, KeyRing
from app.access.key_format import digest_of, id_of, new_key
from app.access.keys import Found, KeyRecord
from app.access.limits import NOTHING_SAID
from app.access.roles import Role
from app.errors import StoreUnavailable
from app.types import Limits, Rights
from tests.web.harness import until

ROLE = Role(name="admin", limits=NOTHING_SAID, rights=Rights(manage_keys=True))


class Store:
    """Keys and roles of a database that can be slow or away."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.asked = 0
        self.delay = 0.0
        self.away = False
        self.answers = asyncio.Event()
        self.answers.set()
        self.revoked: datetime | None = None

    async def _answer(self) -> None:
        self.asked += 1
        await asyncio.sleep(self.delay)
        await self.answers.wait()
        if self.away:
            raise StoreUnavailable()

    async def find(self, key_id: str) -> Found | None:
        await self._answer()
        if key_id != id_of(self.key):
            return None
        none: dict[str, Any] = dict.fromkeys(("owner", "expires", "last_used", "previous_expires"))
        record = KeyRecord(
            id=key_id,
            last_four="",
            role="admin",
            limits=NOTHING_SAID,
            created=datetime.now(UTC),
            revoked=self.revoked,
            **none,
        )
        return Found(record=record, role=ROLE, digest=digest_of(self.key.encode()), previous_digest=None)

    async def read(self, name: str) -> Role:
        await self._answer()
        return ROLE


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def key() -> str:
    return new_key()


@pytest.fixture
def store(key: str) -> Store:
    return Store(key)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def ring(store: Store, clock: Clock) -> AsyncIterator[KeyRing]:
    ring = KeyRing(store, store, Limits(), configured_key="configured-key", clock=clock)  # type: ignore[arg-type]
    yield ring
    await ring.close()


async def test_the_database_is_asked_once_in_a_while_and_then_believed(
    ring: KeyRing, store: Store, clock: Clock, key: str
):
    """A revocation holds as soon as what is remembered is no longer fresh: within five seconds."""
    assert FRESH_SECONDS < 5
    for _ in range(10):
        assert await ring.authenticate(key.encode()) is not None
    assert 1 == store.asked

    store.revoked = datetime.now(UTC)
    clock.now += FRESH_SECONDS + 0.1
    assert await ring.authenticate(key.encode()) is None


async def test_a_known_key_outlives_an_outage_of_a_minute_and_no_longer(
    ring: KeyRing, store: Store, clock: Clock, key: str
):
    """An unknown one is nobody's fault: 503 and not 401."""
    await ring.authenticate(key.encode())
    store.away = True

    clock.now += STALE_SECONDS
    assert await ring.authenticate(key.encode()) is not None
    clock.now += 1
    with pytest.raises(StoreUnavailable):
        await ring.authenticate(key.encode())
    with pytest.raises(StoreUnavailable):
        await ring.authenticate(new_key().encode())


async def test_a_known_key_does_not_wait_for_a_slow_database(ring: KeyRing, store: Store, clock: Clock, key: str):
    """One request waits a moment; those after it not at all, for a second."""
    await ring.authenticate(key.encode())
    store.delay = 30
    clock.now += FRESH_SECONDS + 0.1
    loop = asyncio.get_running_loop()

    began = loop.time()
    assert await ring.authenticate(key.encode()) is not None
    first = loop.time() - began
    for _ in range(100):
        assert await ring.authenticate(key.encode()) is not None

    assert first < 2
    assert 2 == store.asked


async def test_a_key_in_use_never_waits_for_a_database_that_stalls(
    ring: KeyRing, store: Store, clock: Clock, key: str, monkeypatch: pytest.MonkeyPatch
):
    """It is asked behind the requests, so that its silence is known before anybody depends on it."""
    monkeypatch.setattr(key_ring, "KNOWN_WAIT_SECONDS", 60)
    await ring.authenticate(key.encode())
    store.answers.clear()

    async with asyncio.timeout(5):
        clock.now += RENEW_SECONDS + 0.1
        assert await ring.authenticate(key.encode()) is not None
        await until(lambda: store.asked == 2)
        store.away = True
        store.answers.set()
        await until(lambda: ring._away)
        store.answers.clear()
        for _ in range(11):
            clock.now += FRESH_SECONDS + 1
            assert await ring.authenticate(key.encode()) is not None


async def test_a_revoked_key_in_use_is_found_out_behind_its_requests(
    ring: KeyRing, store: Store, clock: Clock, key: str
):
    await ring.authenticate(key.encode())
    store.revoked = datetime.now(UTC)

    clock.now += RENEW_SECONDS + 0.1
    assert await ring.authenticate(key.encode()) is not None
    await until(lambda: not ring._asking)
    assert await ring.authenticate(key.encode()) is None


async def lose(store: Store, ring: KeyRing, clock: Clock, key: str) -> None:
    """Let the database go away under a key that is known, and the ring find out."""
    await ring.authenticate(key.encode())
    store.away = True
    clock.now += FRESH_SECONDS + 0.1
    assert await ring.authenticate(key.encode()) is not None


async def test_a_database_that_is_back_is_believed_again(
    ring: KeyRing, store: Store, clock: Clock, key: str, monkeypatch: pytest.MonkeyPatch
):
    """What was revoked while nobody could be asked is refused."""
    monkeypatch.setattr(key_ring, "PROBE_SECONDS", 0.01)
    await lose(store, ring, clock, key)
    await until(lambda: store.asked > 5)
    store.away, store.revoked = False, datetime.now(UTC)

    await until(lambda: not ring._away)
    assert await ring.authenticate(key.encode()) is None


async def test_a_probe_that_fails_strangely_does_not_end_the_questions(
    ring: KeyRing, store: Store, clock: Clock, key: str, monkeypatch: pytest.MonkeyPatch
):
    """Else a revoked key would be let in until it is forgotten."""
    monkeypatch.setattr(key_ring, "PROBE_SECONDS", 0.01)
    await lose(store, ring, clock, key)
    monkeypatch.setattr(store, "read", strange)
    store.away, store.revoked = False, datetime.now(UTC)

    await until(lambda: not ring._away)
    assert await ring.authenticate(key.encode()) is None


async def strange(name: str) -> Role:
    raise RuntimeError("a driver's own error")


async def test_a_slow_database_is_believed_all_the_same(
    ring: KeyRing, store: Store, clock: Clock, key: str, monkeypatch: pytest.MonkeyPatch
):
    """One that takes longer than anybody waits still tells who was revoked."""
    monkeypatch.setattr(key_ring, "KNOWN_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(key_ring, "PROBE_SECONDS", 0.01)
    await ring.authenticate(key.encode())
    store.delay, store.revoked = 0.05, datetime.now(UTC)

    clock.now += FRESH_SECONDS + 0.1
    assert await ring.authenticate(key.encode()) is not None
    await until(lambda: not ring._running)
    assert await ring.authenticate(key.encode()) is None


async def test_nothing_is_asked_after_the_end(ring: KeyRing, store: Store, key: str):
    """Not even what nobody waits for any more."""
    store.answers.clear()
    early = asyncio.create_task(ring.authenticate(key.encode()))
    await until(lambda: store.asked == 1)
    ring.forget_all()
    (asking,) = ring._running

    await ring.close()

    assert asking.cancelled()
    with pytest.raises(asyncio.CancelledError):
        await early


async def test_what_was_asked_before_a_change_is_not_remembered_after_it(ring: KeyRing, store: Store, key: str):
    """A revocation here holds at once, whatever is on its way from the database."""
    store.answers.clear()
    early = asyncio.create_task(ring.authenticate(key.encode()))
    await until(lambda: store.asked == 1)
    ring.forget(str(id_of(key)))
    store.answers.set()
    assert await early is not None
    store.revoked = datetime.now(UTC)

    assert await ring.authenticate(key.encode()) is None


async def test_requests_of_one_key_ask_once(ring: KeyRing, store: Store, key: str):
    """One that hangs up does not take the answer from the others."""
    store.answers.clear()
    first, *others = [asyncio.create_task(ring.authenticate(key.encode())) for _ in range(5)]
    await until(lambda: store.asked == 1)
    first.cancel()
    store.answers.set()

    assert all(await asyncio.gather(*others))
    assert 1 == store.asked


async def test_the_configured_key_needs_no_database(ring: KeyRing, store: Store):
    """The configuration vouches for it, also when nobody was ever asked."""
    store.away = True

    principal = await ring.authenticate(b"configured-key")

    assert principal is not None
    assert ("admin", True, 0) == (principal.key_id, principal.rights.manage_keys, principal.limits.monthly_tokens)


@pytest.mark.parametrize("wrong", [b"", b"configured-ke", b"configured-key ", b"\xff\x00", b"llm_", b"x" * 10_000])
async def test_what_cannot_be_a_key_asks_no_database(ring: KeyRing, store: Store, wrong: bytes):
    assert await ring.authenticate(wrong) is None
    assert 0 == store.asked


async def test_memory_is_bounded(ring: KeyRing, monkeypatch: pytest.MonkeyPatch):
    """However many keys come by."""
    monkeypatch.setattr(key_ring, "MAX_REMEMBERED", 3)
    ring.forget_all()
    for number in range(10):
        ring._known[bytes([number])] = ring._as_admin(Rights(), Limits(), 0)

    assert 3 == len(ring._known)


async def test_no_key_is_in_a_repr(ring: KeyRing, key: str):
    principal = await ring.authenticate(key.encode())

    assert key not in repr(ring) + str(vars(ring)) + repr(principal)
    assert "configured-key" not in str(vars(ring))
