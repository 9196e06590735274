"""What is remembered of keys, and for how long, while the database is there, away or slow."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from app.access import authenticator as module
from app.access.authenticator import (
    FRESH_SECONDS,
    RENEW_DELAY_SECONDS,
    RENEW_SECONDS,
    STALE_SECONDS,
    Authenticator,
)
from app.access.background import BackgroundGroup
from app.access.circuit_breaker import CircuitBreaker
from app.access.key_format import digest_of, id_of, new_key
from app.access.key_verifier import KeyVerifier
from app.access.keys import KeyRecord, KeyWithRole
from app.access.limits import NOTHING_SAID
from app.access.roles import Role
from app.errors import StoreUnavailable
from app.types import Limits, Rights
from tests.waiting import HANG_SECONDS, until

ROLE = Role(name="admin", limits=NOTHING_SAID, rights=Rights(manage_keys=True))
PROBE_SECONDS = 0.01


class Store:
    """Keys and roles of a database that can be slow or away, with its circuit breaker."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.queries = 0
        self.delay = 0.0
        self.away = False
        self.answers = asyncio.Event()
        self.answers.set()
        self.revoked: datetime | None = None
        self.breaker = CircuitBreaker(self.probe, probe_seconds=PROBE_SECONDS)

    async def _answer(self) -> None:
        self.queries += 1
        await asyncio.sleep(self.delay)
        await self.answers.wait()
        if self.away:
            self.breaker.trip()
            raise StoreUnavailable()
        self.breaker.reset()

    async def probe(self) -> None:
        await self._answer()

    async def find(self, key_id: str) -> KeyWithRole | None:
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
        return KeyWithRole(record=record, role=ROLE, digest=digest_of(self.key.encode()), previous_digest=None)

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


def make(store: Store, clock: Clock, background: BackgroundGroup, **given: Any) -> Authenticator:
    verifier = KeyVerifier(store, store, Limits(), configured_key="configured-key")  # type: ignore[arg-type]  # a fake
    return Authenticator(verifier, breaker=store.breaker, background=background, clock=clock, **given)


@pytest.fixture
def authenticator(store: Store, clock: Clock, background: BackgroundGroup) -> Authenticator:
    return make(store, clock, background)


async def test_the_database_is_asked_once_in_a_while_and_then_believed(
    authenticator: Authenticator, store: Store, clock: Clock, key: str
):
    """A revocation holds as soon as what is remembered is no longer fresh: within five seconds."""
    assert FRESH_SECONDS < 5
    for _ in range(10):
        assert await authenticator.authenticate(key.encode()) is not None
    assert 1 == store.queries

    store.revoked = datetime.now(UTC)
    clock.now += FRESH_SECONDS + 0.1
    assert await authenticator.authenticate(key.encode()) is None


async def test_a_known_key_outlives_an_outage_of_a_minute_and_no_longer(
    authenticator: Authenticator, store: Store, clock: Clock, key: str
):
    """An unknown one is nobody's fault: 503 and not 401."""
    await authenticator.authenticate(key.encode())
    store.away = True

    clock.now += STALE_SECONDS
    assert await authenticator.authenticate(key.encode()) is not None
    clock.now += 1
    with pytest.raises(StoreUnavailable):
        await authenticator.authenticate(key.encode())
    with pytest.raises(StoreUnavailable):
        await authenticator.authenticate(new_key().encode())


async def test_a_known_key_does_not_wait_for_a_slow_database(
    authenticator: Authenticator, store: Store, clock: Clock, key: str
):
    """One request waits a moment; those after it not at all, until the database is found to answer again."""
    await authenticator.authenticate(key.encode())
    store.delay = 30
    clock.now += FRESH_SECONDS + 0.1
    loop = asyncio.get_running_loop()

    began = loop.time()
    assert await authenticator.authenticate(key.encode()) is not None
    first = loop.time() - began
    for _ in range(100):
        assert await authenticator.authenticate(key.encode()) is not None

    assert first < 15
    assert 2 == store.queries


async def test_a_key_in_use_never_waits_for_a_database_that_stalls(
    authenticator: Authenticator, store: Store, clock: Clock, key: str, monkeypatch: pytest.MonkeyPatch
):
    """It is asked behind the requests, so that its silence is known before anybody depends on it."""
    monkeypatch.setattr(module, "KNOWN_WAIT_SECONDS", 60)
    await authenticator.authenticate(key.encode())
    store.answers.clear()

    async with asyncio.timeout(HANG_SECONDS):
        clock.now += RENEW_SECONDS + 0.1
        assert await authenticator.authenticate(key.encode()) is not None
        await until(lambda: store.queries == 2)
        store.away = True
        store.answers.set()
        await until(lambda: store.breaker.open)
        store.answers.clear()
        for _ in range(11):
            clock.now += FRESH_SECONDS + 1
            assert await authenticator.authenticate(key.encode()) is not None


async def test_a_revoked_key_in_use_is_found_out_behind_its_requests(
    authenticator: Authenticator, store: Store, clock: Clock, key: str
):
    await authenticator.authenticate(key.encode())
    store.revoked = datetime.now(UTC)

    clock.now += RENEW_SECONDS + 0.1
    assert await authenticator.authenticate(key.encode()) is not None
    await until(lambda: not authenticator.pending)
    assert await authenticator.authenticate(key.encode()) is None


async def test_a_key_in_use_is_verified_again_once_its_request_has_gone_on(
    authenticator: Authenticator, store: Store, clock: Clock, key: str
):
    """The threads of the database would take their time from the request that asked for it."""
    await authenticator.authenticate(key.encode())
    clock.now += RENEW_SECONDS + 0.1
    began = asyncio.get_running_loop().time()

    await authenticator.authenticate(key.encode())
    await until(lambda: store.queries == 2)

    assert asyncio.get_running_loop().time() - began >= RENEW_DELAY_SECONDS - 0.01


async def lose(store: Store, authenticator: Authenticator, clock: Clock, key: str) -> None:
    """Let the database go away under a key that is known, and the authenticator find out."""
    await authenticator.authenticate(key.encode())
    store.away = True
    clock.now += FRESH_SECONDS + 0.1
    assert await authenticator.authenticate(key.encode()) is not None


async def test_a_database_that_is_back_is_believed_again(
    authenticator: Authenticator, store: Store, clock: Clock, key: str, background: BackgroundGroup
):
    """What was revoked while nobody could be asked is refused."""
    background.spawn(store.breaker.watch())
    await lose(store, authenticator, clock, key)
    await until(lambda: store.queries > 5)
    store.away, store.revoked = False, datetime.now(UTC)

    await until(lambda: not store.breaker.degraded)
    assert await authenticator.authenticate(key.encode()) is None


async def test_a_probe_that_fails_strangely_does_not_end_the_questions(
    store: Store, clock: Clock, key: str, background: BackgroundGroup
):
    """Else a revoked key would be let in until it is forgotten."""
    store.breaker = CircuitBreaker(strange, probe_seconds=PROBE_SECONDS)
    authenticator = make(store, clock, background)
    background.spawn(store.breaker.watch())
    await lose(store, authenticator, clock, key)
    store.away, store.revoked = False, datetime.now(UTC)

    await until(lambda: not store.breaker.degraded)
    assert await authenticator.authenticate(key.encode()) is None


async def strange() -> None:
    raise RuntimeError("a driver's own error")


async def test_a_slow_database_is_believed_all_the_same(
    authenticator: Authenticator,
    store: Store,
    clock: Clock,
    key: str,
    background: BackgroundGroup,
    monkeypatch: pytest.MonkeyPatch,
):
    """One that takes longer than anybody waits still tells who was revoked."""
    monkeypatch.setattr(module, "KNOWN_WAIT_SECONDS", 0.01)
    background.spawn(store.breaker.watch())
    await authenticator.authenticate(key.encode())
    store.delay, store.revoked = 0.05, datetime.now(UTC)

    clock.now += FRESH_SECONDS + 0.1
    assert await authenticator.authenticate(key.encode()) is not None
    await until(lambda: not authenticator.pending)
    assert await authenticator.authenticate(key.encode()) is None


async def test_nothing_is_asked_after_the_end(
    authenticator: Authenticator, store: Store, key: str, background: BackgroundGroup
):
    """Not even what nobody waits for any more."""
    store.answers.clear()
    early = asyncio.create_task(authenticator.authenticate(key.encode()))
    await until(lambda: store.queries == 1)
    authenticator.forget()

    await background.close()

    with pytest.raises(asyncio.CancelledError):
        await early


async def test_what_was_asked_before_a_change_is_not_remembered_after_it(
    authenticator: Authenticator, store: Store, key: str
):
    """A revocation here holds at once, whatever is on its way from the database."""
    store.answers.clear()
    early = asyncio.create_task(authenticator.authenticate(key.encode()))
    await until(lambda: store.queries == 1)
    authenticator.forget(str(id_of(key)))
    store.answers.set()
    assert await early is not None
    store.revoked = datetime.now(UTC)

    assert await authenticator.authenticate(key.encode()) is None


async def test_a_change_to_one_key_leaves_the_others_remembered(authenticator: Authenticator, store: Store, key: str):
    await authenticator.authenticate(key.encode())
    await authenticator.authenticate(b"configured-key")
    queries = store.queries

    authenticator.forget(str(id_of(key)))
    await authenticator.authenticate(b"configured-key")
    assert queries == store.queries
    await authenticator.authenticate(key.encode())
    assert queries + 1 == store.queries


async def test_requests_of_one_key_ask_once(authenticator: Authenticator, store: Store, key: str):
    """One that hangs up does not take the result from the others."""
    store.answers.clear()
    first, *others = [asyncio.create_task(authenticator.authenticate(key.encode())) for _ in range(5)]
    await until(lambda: store.queries == 1)
    first.cancel()
    store.answers.set()

    assert all(await asyncio.gather(*others))
    assert 1 == store.queries


async def test_the_configured_key_needs_no_database(authenticator: Authenticator, store: Store):
    """The configuration vouches for it, also when nobody was ever asked."""
    store.away = True

    principal = await authenticator.authenticate(b"configured-key")

    assert principal is not None
    assert ("admin", True, 0) == (principal.key_id, principal.rights.manage_keys, principal.limits.monthly_tokens)


@pytest.mark.parametrize("wrong", [b"", b"configured-ke", b"configured-key ", b"\xff\x00", b"llm_", b"x" * 10_000])
async def test_what_cannot_be_a_key_asks_no_database(authenticator: Authenticator, store: Store, wrong: bytes):
    assert await authenticator.authenticate(wrong) is None
    assert 0 == store.queries


async def test_memory_is_bounded(store: Store, clock: Clock, background: BackgroundGroup):
    """However many keys come by; the one before the last is asked for again once a newer one took its place."""
    authenticator = make(store, clock, background, max_remembered=1)
    for _ in range(3):
        for presented in (store.key.encode(), b"configured-key"):
            assert await authenticator.authenticate(presented) is not None
            assert 1 == authenticator.remembered

    assert 6 == store.queries


async def test_no_key_is_in_a_repr(authenticator: Authenticator, key: str):
    principal = await authenticator.authenticate(key.encode())

    assert key not in repr(authenticator) + str(vars(authenticator)) + repr(principal)
    assert "configured-key" not in str(vars(authenticator))
