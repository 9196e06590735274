"""What the response cache keeps, for how long, and what it must never give to anyone else."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, fields, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.config import CacheConfig
from app.engine import cache
from app.engine.base import EngineInfo
from app.engine.cache import CachedEngine, CacheStats, cache_key
from app.engine.echo import EchoEngine
from app.types import FinishReason, SamplingParams, Usage
from tests.unit.engine.scripted import REQUEST, ScriptedEngine, ask, read


class CountingMetrics:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.hits = self.misses = 0

    def cache_hit(self) -> None:
        self.hits += 1

    def cache_miss(self) -> None:
        self.misses += 1


@dataclass
class Clock:
    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


INFO = EngineInfo("model", "r1", "echo", "cpu", "float32", 2048, 1000, 1)


async def test_an_identical_request_is_replayed_in_its_pieces():
    """The second answer is the first one: pieces, tokens, end and usage, all marked as cached."""
    inner, metrics = ScriptedEngine("Hel", "lo", "!").run_freely(), CountingMetrics()
    engine = CachedEngine(inner, CacheConfig(), metrics=metrics)

    first = await read(engine, ask("1"))
    second = await read(engine, ask("2"))

    assert 1 == len(inner.calls)
    assert ["", "Hel", "lo", "!", ""] == [chunk.text for chunk in first]
    assert [False] * 5 == [chunk.cached for chunk in first]
    assert [replace(chunk, cached=True) for chunk in first] == second
    assert Usage(3, 3) == second[-1].usage
    assert (1, 1) == (metrics.hits, metrics.misses)
    assert CacheStats(hits=1, misses=1, entries=1, size=100, bytes=5 * 200 + 6) == engine.stats()


async def test_log_probabilities_are_replayed_with_their_pieces_and_count_in_bytes():
    """What was told of each token is told again; stored answers with alternatives are heavier than those without."""
    weights = []
    for logprobs in (None, 0, 1):
        inner = EchoEngine()
        await inner.start()
        engine = CachedEngine(inner, CacheConfig())
        params = SamplingParams(max_tokens=5, logprobs=logprobs)
        first, second = [await read(engine, ask(name, prompt_ids=(104, 105), params=params)) for name in ("1", "2")]

        assert [replace(chunk, cached=True) for chunk in first] == second
        assert (2 if logprobs is not None else 0) == sum(len(chunk.logprobs) for chunk in second)
        weights.append(engine.stats().bytes)

    assert weights == sorted(set(weights))


async def test_two_tenants_never_share_an_answer():
    """The same prompt of another tenant is another generation."""
    inner = ScriptedEngine("hi").run_freely()
    engine = CachedEngine(inner, CacheConfig())

    chunks = [await read(engine, ask("1")), await read(engine, ask("2", tenant="bob"))]

    assert ["ann", "bob"] == [call.tenant for call in inner.calls]
    assert [False, False] == [each[-1].cached for each in chunks]


def test_another_policy_is_another_answer():
    """What was made under one output policy is not given under the next, even by an engine that is told of it later."""
    request = ask("1")

    assert cache_key(request, INFO, "pii: mask") != cache_key(request, INFO, "pii: off")


OTHER_PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 4096),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 100),
    repetition_penalty=st.floats(0.5, 2),
    stop=st.lists(st.text(min_size=1, max_size=4), max_size=3).map(tuple),
    seed=st.none() | st.integers(),
    sample=st.integers(0, 7),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.lists(st.tuples(st.integers(0, 300), st.floats(-100, 100)), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    stop_token_ids=st.lists(st.integers(0, 300), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 64),
)
CHANGED = SamplingParams(
    max_tokens=65,
    temperature=0.5,
    top_p=0.5,
    top_k=5,
    repetition_penalty=1.5,
    stop=("x",),
    seed=5,
    sample=1,
    min_p=0.5,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    logit_bias=((5, 0.5),),
    logprobs=0,
    stop_token_ids=(5,),
    ignore_eos=True,
    min_tokens=5,
)
"""Differs from REQUEST in every field."""


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
@settings(max_examples=25, deadline=None)
@given(mine=OTHER_PARAMS, other=OTHER_PARAMS)
def test_every_field_of_the_parameters_is_in_the_key(name: str, mine: SamplingParams, other: SamplingParams):
    """Change one and only one: another key, exactly if it really is another value."""
    changed = replace(mine, **{name: getattr(other, name)})

    same = cache_key(ask("1", params=mine), INFO, "") == cache_key(ask("2", params=changed), INFO, "")

    assert same == (repr(mine) == repr(changed))


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
async def test_requests_that_differ_in_one_field_never_share_an_answer(name: str):
    """Whatever the field: the model is asked again, and for the first request only once."""
    inner = ScriptedEngine("hi").run_freely()
    engine = CachedEngine(inner, CacheConfig())
    other = replace(REQUEST.params, **{name: getattr(CHANGED, name)})

    cached = [
        (await read(engine, ask(str(n), params=each)))[-1].cached for n, each in enumerate([REQUEST.params, other])
    ]
    again = (await read(engine, ask("again")))[-1].cached

    assert other != REQUEST.params
    assert ([False, False], True) == (cached, again)


@pytest.mark.parametrize("name", [field.name for field in fields(EngineInfo)])
def test_every_fact_of_the_model_is_in_the_key(name: str):
    """Another model, revision, engine or type: another key."""
    other = replace(INFO, **{name: "other" if isinstance(getattr(INFO, name), str) else 7})

    assert cache_key(REQUEST, INFO, "") != cache_key(REQUEST, other, "")


@settings(deadline=None)
@example(("ab", "c", ()), ("a", "bc", ()))
@given(
    st.tuples(st.text(max_size=3), st.text(max_size=3), st.lists(st.integers(0, 300), max_size=4).map(tuple)),
    st.tuples(st.text(max_size=3), st.text(max_size=3), st.lists(st.integers(0, 300), max_size=4).map(tuple)),
)
def test_parts_never_run_together(mine, other):
    """Tenant, policy and prompt: two keys are equal exactly if all three are."""
    keys = [cache_key(ask("1", tenant=a, prompt_ids=ids), INFO, b) for a, b, ids in (mine, other)]

    assert (keys[0] == keys[1]) == (mine == other)


async def test_a_request_that_wants_no_cache_goes_past_it():
    """Nothing stored is given to it, and its own answer is not stored."""
    inner = ScriptedEngine("hi").run_freely()
    engine = CachedEngine(inner, CacheConfig())

    await read(engine, ask("1"))
    past = await read(engine, ask("2", cache=False))
    await read(engine, ask("3", tenant="bob", cache=False))
    await read(engine, ask("4", tenant="bob"))

    assert not past[-1].cached
    assert 4 == len(inner.calls)
    assert "2" == inner.calls[1].id


async def test_a_request_past_the_cache_can_be_aborted():
    """Its id is the inner engine's own."""
    inner = ScriptedEngine("hi")
    engine = CachedEngine(inner, CacheConfig())
    async with aclosing(engine.stream(ask("7", cache=False))) as stream:
        await anext(stream)
        await engine.abort("7")

    assert ["7"] == inner.aborted


async def test_an_old_answer_is_made_anew():
    """After the time to live the model is asked again."""
    inner, clock = ScriptedEngine("hi").run_freely(), Clock()
    engine = CachedEngine(inner, CacheConfig(ttl_seconds=60), clock=clock)

    await read(engine, ask("1"))
    clock.seconds = 59
    young = await read(engine, ask("2"))
    clock.seconds = 61
    old = await read(engine, ask("3"))

    assert (True, False) == (young[-1].cached, old[-1].cached)
    assert 2 == len(inner.calls)


async def test_the_least_recently_used_answer_goes_first():
    """No more answers than `size`."""
    inner = ScriptedEngine("hi").run_freely()
    engine = CachedEngine(inner, CacheConfig(size=2))

    for tenant in ("a", "b", "a", "c"):
        await read(engine, ask(tenant, tenant=tenant))
    kept = [(await read(engine, ask(tenant, tenant=tenant)))[-1].cached for tenant in ("a", "c", "b")]

    assert [True, True, False] == kept
    assert 2 == engine.stats().entries


async def test_stored_answers_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch):
    """Long answers push out others; one longer than all room is not stored."""
    monkeypatch.setattr(cache, "MAX_BYTES", 3000)
    inner = ScriptedEngine("x" * 600).run_freely()
    engine = CachedEngine(inner, CacheConfig())

    for tenant in "abcd":
        await read(engine, ask(tenant, tenant=tenant))
    several = engine.stats()
    inner.pieces = ("x" * 4000,)
    await read(engine, ask("e", tenant="e"))

    assert 2 == several.entries
    assert several.bytes <= 3000
    assert several.entries == engine.stats().entries


@pytest.mark.parametrize("end", [FinishReason.ABORT, FinishReason.CONTENT_FILTER])
async def test_an_incomplete_answer_is_not_stored(end: FinishReason):
    """What was cut short or filtered away is made anew for the next one."""
    inner = ScriptedEngine("a", end=end).run_freely()
    engine = CachedEngine(inner, CacheConfig())

    first = await read(engine, ask("1"))
    await read(engine, ask("2"))

    assert end is first[-1].finish_reason
    assert 2 == len(inner.calls)
    assert 0 == engine.stats().entries


async def test_a_replay_lets_others_run():
    """A long stored answer does not hold the event loop."""
    engine = CachedEngine(ScriptedEngine(*"x" * 400).run_freely(), CacheConfig())
    await read(engine, ask("1"))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    busy = asyncio.create_task(other())
    await read(engine, ask("2"))
    busy.cancel()

    assert turns > 10


async def test_the_rest_is_the_inner_engine_s():
    """Facts, tokenizer, state and start are passed through."""
    inner = EchoEngine()
    engine = CachedEngine(inner, CacheConfig())

    await engine.start()
    await engine.wait_ready()

    assert inner.info is engine.info
    assert inner.tokenizer is engine.tokenizer
    assert inner.status() == engine.status()
