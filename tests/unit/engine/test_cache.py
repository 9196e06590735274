"""What the response cache stores, for how long, and what it must never give to anyone else."""

import asyncio
from contextlib import aclosing
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from app.config import CacheConfig
from app.engine import cache
from app.engine.base import Capabilities, EngineInfo
from app.engine.cache import CachedEngine, CacheStats, cache_key
from app.engine.echo import EchoEngine
from app.events import CacheStatus, Delta, Event
from app.requests import HARMLESS, GenerationRequest, Origin, Progress, keyed_fields
from app.types import FinishReason, Grammar, Message, Role, SamplingParams, StepTimes, Tenant, Tool, ToolChoice, Usage
from app.web.openai.response_objects import fingerprint
from tests.examples import examples
from tests.unit.engine.scripted import REQUEST, ScriptedEngine, make_request
from tests.unit.event_streams import finished_of, logprobs_of, read, started_of, text_of


class CountingMetrics:
    """Counts hits and misses."""

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


INFO = EngineInfo(
    model="model",
    engine="echo",
    context_length=2048,
    revision="r1",
    device="cpu",
    dtype="float32",
    vocab_size=1000,
    parameters=1,
)


def with_status(events: list[Event], status: CacheStatus) -> list[Event]:
    """Return events as they are where the cache had this to do with them."""
    return [event if isinstance(event, Delta) else structs.replace(event, cache=status) for event in events]


async def test_an_identical_request_is_replayed_delta_by_delta():
    """The second response is the first one: texts, tokens, end and usage; only its cache status differs."""
    inner, metrics = ScriptedEngine("Hel", "lo", "!").run_freely(), CountingMetrics()
    engine = CachedEngine(inner, CacheConfig(), metrics=metrics)

    first = await read(engine.stream(make_request("1")))
    second = await read(engine.stream(make_request("2")))

    assert 1 == len(inner.requests)
    assert ["Hel", "lo", "!"] == [event.text for event in first[1:-1] if isinstance(event, Delta)]
    assert with_status(first, CacheStatus.MISS) == first
    assert with_status(first, CacheStatus.HIT) == second
    assert Usage(3, 3) == finished_of(second).usage
    assert (1, 1) == (metrics.hits, metrics.misses)
    assert CacheStats(hits=1, misses=1, entries=1, size=100, bytes=3 * 200 + 6) == engine.stats()


async def test_log_probabilities_are_replayed_with_their_deltas_and_count_in_bytes():
    """Each token's are there again; stored responses with alternatives are heavier than those without."""
    weights = []
    for logprobs in (None, 0, 1):
        inner = EchoEngine()
        await inner.start()
        engine = CachedEngine(inner, CacheConfig())
        sampling = SamplingParams(max_tokens=5, logprobs=logprobs)
        first, second = [
            await read(engine.stream(make_request(name, prompt_ids=(104, 105), sampling=sampling)))
            for name in ("1", "2")
        ]

        assert with_status(first, CacheStatus.HIT) == second
        assert (2 if logprobs is not None else 0) == len(logprobs_of(second))
        weights.append(engine.stats().bytes)

    assert weights == sorted(set(weights))


async def test_a_replay_generates_nothing():
    """The progress of a replayed request stays where it was, which is what it is charged by."""
    engine = CachedEngine(ScriptedEngine("a", "b").run_freely(), CacheConfig())
    first, second = make_request("1"), make_request("2")

    for each in (first, second):
        await read(engine.stream(each))

    assert (2, 0) == (first.progress.generated, second.progress.generated)


@pytest.mark.parametrize(
    "other",
    [{"tenant": Tenant.owner("bob")}, {"adapter": "legal"}, {"tenant": Tenant.owner("bob"), "adapter": "legal"}],
    ids=str,
)
async def test_two_tenants_or_adapters_never_share_a_response(other: dict[str, Any]):
    """The same prompt of another tenant, or for another adapter, is another generation, at the same time or later."""
    inner = ScriptedEngine("hi").run_freely()
    engine = CachedEngine(inner, CacheConfig())

    at_once = await asyncio.gather(
        read(engine.stream(make_request("1"))), read(engine.stream(make_request("2", **other)))
    )
    later = [await read(engine.stream(make_request("3", **each))) for each in ({}, other)]

    assert {(Tenant.owner("ann"), None), (other.get("tenant", Tenant.owner("ann")), other.get("adapter"))} == {
        (each.tenant, each.adapter) for each in inner.requests
    }
    assert [False, False] == [finished_of(each).cached for each in at_once]
    assert [True, True] == [finished_of(each).cached for each in later]


def test_another_output_policy_is_another_response():
    """What was generated under one policy is not given under the next, even by an engine that learns of it later."""
    request = make_request("1")

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
    prompt_logprobs=st.none() | st.integers(0, 20),
    stop_token_ids=st.lists(st.integers(0, 300), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 64),
    grammar=st.none() | st.builds(Grammar, st.sampled_from(["json_schema", "regex", "lark"]), st.text(max_size=4)),
)


@pytest.mark.parametrize("name", [each.name for each in fields(SamplingParams)])
@examples(25)
@given(mine=OTHER_PARAMS, other=OTHER_PARAMS)
def test_every_sampling_parameter_is_in_the_key(name: str, mine: SamplingParams, other: SamplingParams):
    """Change one and only one: another key, exactly if it really is another value."""
    changed = replace(mine, **{name: getattr(other, name)})

    same = key(make_request("1", sampling=mine)) == key(make_request("2", sampling=changed))

    assert same == (repr(mine) == repr(changed))


CHANGED: dict[str, Any] = {
    "default_max_tokens": 9,
    "most_prompt_tokens": 90,
    "id": "other",
    "tenant": Tenant.owner("bob"),
    "messages": (Message(Role.USER, "Hi"),),
    "text": "Hi",
    "prompt_ids": (1, 2, 4),
    "counted_tokens": 5,
    "uncounted_tokens": 900,
    "counts_prompt": True,
    "continue_final_message": True,
    "echo": True,
    "hidden_tokens": 2,
    "sampling": SamplingParams(max_tokens=65),
    "unset": frozenset({"temperature"}),
    "use_recommended": True,
    "n": 2,
    "adapter": "legal",
    "adapter_digest": "0123",
    "shown_tokens": (("<tool>", 7),),
    "model": "other",
    "priority": 1,
    "session_id": "s",
    "cache": False,
    "cache_random": False,
    "stream": False,
    "origin": Origin(route="/v1/chat"),
    "progress": Progress(),
    "tools": (Tool("add"),),
    "tool_choice": ToolChoice("none"),
    "parallel_tool_calls": False,
    "template_kwargs": (("enable_thinking", False),),
    "truncate_prompt": -1,
    "reasoning_effort": "low",
}
"""Differs from REQUEST in every field of a request; a field added to it has to be added here."""


def key(request: GenerationRequest, info: EngineInfo = INFO) -> bytes:
    return cache_key(request, info, "")


def harmless_fields(kind: type[GenerationRequest]) -> set[str]:
    return {each.name for each in structs.fields(kind) if HARMLESS in getattr(each.type, "__metadata__", ())}


@pytest.mark.parametrize("name", [each.name for each in structs.fields(GenerationRequest)])
def test_every_field_of_a_request_is_in_the_key_unless_it_is_declared_harmless(name: str):
    """Whatever the field: changed alone, it makes another key, or none if its declaration says so."""
    changed = structs.replace(REQUEST, **{name: CHANGED[name]})

    assert getattr(REQUEST, name) is not CHANGED[name]
    assert (key(REQUEST) == key(changed)) == (name in harmless_fields(GenerationRequest))


def test_what_decides_a_response_is_never_declared_harmless():
    """The declared ones are those that say where a request comes from, how it is delivered and how it is queued."""
    assert {
        "tenant",
        "messages",
        "text",
        "prompt_ids",
        "continue_final_message",
        "echo",
        "hidden_tokens",
        "sampling",
        "unset",
        "adapter",
        "adapter_digest",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "template_kwargs",
        "reasoning_effort",
    } == {each.name for each in structs.fields(GenerationRequest)} - harmless_fields(GenerationRequest)


@pytest.mark.parametrize(("kind", "keyed"), [(str, True), (Annotated[str, HARMLESS], False)], ids=["keyed", "harmless"])
def test_a_field_that_is_added_to_the_request_is_in_the_key_by_itself(kind: Any, keyed: bool):
    """Nobody has to think of the cache when adding a field; to leave it out takes a declaration."""
    extended: Any = msgspec.defstruct(
        "Extended", [("guidance", kind, "")], bases=(GenerationRequest,), frozen=True, kw_only=True
    )
    plain, guided = [
        extended(id="1", tenant=Tenant.owner("ann"), prompt_ids=(1,), guidance=guidance) for guidance in ("", "[0-9]+")
    ]

    assert keyed == ("guidance" in keyed_fields(extended))
    assert set(keyed_fields(GenerationRequest)) <= set(keyed_fields(extended))
    assert keyed == (key(plain) != key(guided))


def test_a_sampling_parameter_or_a_fact_that_is_added_is_in_the_key_by_itself():
    """Both are written into the key whole."""
    params = make_dataclass("Params", [("top_a", float, 0.0)], bases=(SamplingParams,), frozen=True, kw_only=True)
    facts = make_dataclass("Facts", [("layers", int, 1)], bases=(EngineInfo,), frozen=True, kw_only=True)
    info = facts(model="m", engine="echo", context_length=1)

    assert key(make_request("1", sampling=params())) != key(make_request("1", sampling=params(top_a=0.5)))
    assert key(REQUEST, info) != key(REQUEST, replace(info, layers=2))


def test_times_that_every_load_measures_anew_are_not_in_the_key():
    """A restart would find nothing of what was kept before it."""
    times = StepTimes(kind="decode", tokens=1, way="torch", milliseconds={"torch": 9.5})
    measured = replace(INFO, step_times=(times,))

    assert key(REQUEST, measured) == key(REQUEST)
    assert fingerprint(measured) == fingerprint(INFO)
    assert [asdict(times)] == measured.as_dict()["step_times"]


@pytest.mark.parametrize("name", [each.name for each in fields(EngineInfo) if each.name != "step_times"])
def test_every_fact_of_the_model_is_in_the_key(name: str):
    """Another model, revision, engine or type: another key."""
    value = getattr(INFO, name)
    others: dict[type, Any] = {str: "other", Capabilities: Capabilities(adapters=True), tuple: (("top_k", 5.0),)}
    other = replace(INFO, **{name: others.get(type(value), 7)})

    assert INFO != other
    assert key(REQUEST) != key(REQUEST, other)


@pytest.mark.parametrize("name", [each.name for each in fields(Capabilities)])
def test_every_capability_of_the_engine_is_in_the_key(name: str):
    """What an engine can honour decides what it generates."""
    value = getattr(INFO.capabilities, name)
    changes: dict[str, Any] = {name: ("seed",) if isinstance(value, tuple) else not value}
    other = replace(INFO.capabilities, **changes)

    assert key(REQUEST) != key(REQUEST, replace(INFO, capabilities=other))


CHANGED_PARAMS = SamplingParams(
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
    prompt_logprobs=0,
    stop_token_ids=(5,),
    ignore_eos=True,
    min_tokens=5,
    grammar=Grammar("regex", "[0-9]+"),
)
"""Differs from REQUEST's in every field."""


@pytest.mark.parametrize("name", [each.name for each in fields(SamplingParams)])
async def test_requests_that_differ_in_one_parameter_never_share_a_response(name: str):
    """Whatever the parameter: the model generates again, and for the first request only once."""
    inner = ScriptedEngine("hi").run_freely()
    engine = CachedEngine(inner, CacheConfig())
    other = replace(REQUEST.sampling, **{name: getattr(CHANGED_PARAMS, name)})

    cached = [
        finished_of(await read(engine.stream(make_request(str(number), sampling=each)))).cached
        for number, each in enumerate([REQUEST.sampling, other, REQUEST.sampling])
    ]

    assert other != REQUEST.sampling
    assert [False, False, True] == cached


@settings(deadline=None)
@example(("ab", "c", ()), ("a", "bc", ()))
@given(
    st.tuples(st.text(max_size=3), st.text(max_size=3), st.lists(st.integers(0, 300), max_size=4).map(tuple)),
    st.tuples(st.text(max_size=3), st.text(max_size=3), st.lists(st.integers(0, 300), max_size=4).map(tuple)),
)
def test_parts_never_run_together(mine, other):
    """Tenant, policy and prompt: two keys are equal exactly if all three are."""
    keys = [
        cache_key(make_request("1", tenant=Tenant.owner(a), prompt_ids=ids), INFO, b) for a, b, ids in (mine, other)
    ]

    assert (keys[0] == keys[1]) == (mine == other)


async def test_a_request_that_wants_no_cache_bypasses_it():
    """Nothing stored is given to it, and its own response is not stored; its events say so."""
    inner = ScriptedEngine("hi").run_freely()
    engine = CachedEngine(inner, CacheConfig())

    await read(engine.stream(make_request("1")))
    bypassing = await read(engine.stream(make_request("2", cache=False)))
    await read(engine.stream(make_request("3", tenant=Tenant.owner("bob"), cache=False)))
    await read(engine.stream(make_request("4", tenant=Tenant.owner("bob"))))

    assert (CacheStatus.BYPASS, CacheStatus.BYPASS) == (started_of(bypassing).cache, finished_of(bypassing).cache)
    assert 4 == len(inner.requests)
    assert "2" == inner.requests[1].id


async def test_a_request_that_bypasses_the_cache_can_be_aborted():
    """Its id is the inner engine's own."""
    inner = ScriptedEngine("hi")
    engine = CachedEngine(inner, CacheConfig())
    async with aclosing(engine.stream(make_request("7", cache=False))) as stream:
        await anext(stream)
        await engine.abort("7")

    assert ["7"] == inner.aborted


async def test_an_old_response_is_generated_anew():
    """After the time to live the model generates again."""
    inner, clock = ScriptedEngine("hi").run_freely(), Clock()
    engine = CachedEngine(inner, CacheConfig(ttl_seconds=60), clock=clock)

    await read(engine.stream(make_request("1")))
    clock.seconds = 59
    young = await read(engine.stream(make_request("2")))
    clock.seconds = 61
    old = await read(engine.stream(make_request("3")))

    assert (True, False) == (finished_of(young).cached, finished_of(old).cached)
    assert 2 == len(inner.requests)


async def test_the_least_recently_used_response_is_evicted_first():
    """No more responses than `size`."""
    inner = ScriptedEngine("hi").run_freely()
    engine = CachedEngine(inner, CacheConfig(size=2))

    for tenant in ("a", "b", "a", "c"):
        await read(engine.stream(make_request(tenant, tenant=Tenant.owner(tenant))))
    cached = [
        finished_of(await read(engine.stream(make_request(tenant, tenant=Tenant.owner(tenant))))).cached
        for tenant in ("a", "c", "b")
    ]

    assert [True, True, False] == cached
    assert 2 == engine.stats().entries


async def test_stored_responses_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch):
    """Long responses evict others; one longer than the whole cache is not stored."""
    monkeypatch.setattr(cache, "MAX_BYTES", 2000)
    inner = ScriptedEngine("x" * 600).run_freely()
    engine = CachedEngine(inner, CacheConfig())

    for tenant in "abcd":
        await read(engine.stream(make_request(tenant, tenant=Tenant.owner(tenant))))
    several = engine.stats()
    inner.texts = ("x" * 4000,)
    await read(engine.stream(make_request("e", tenant=Tenant.owner("e"))))

    assert 2 == several.entries
    assert several.bytes <= 2000
    assert several.entries == engine.stats().entries


@pytest.mark.parametrize("end", [FinishReason.ABORT, FinishReason.CONTENT_FILTER])
async def test_an_incomplete_response_is_not_stored(end: FinishReason):
    """What was cut short or filtered away is generated anew for the next one."""
    inner = ScriptedEngine("a", end=end).run_freely()
    engine = CachedEngine(inner, CacheConfig())

    first = await read(engine.stream(make_request("1")))
    await read(engine.stream(make_request("2")))

    assert end is finished_of(first).finish_reason
    assert 2 == len(inner.requests)
    assert 0 == engine.stats().entries


async def test_a_replay_lets_others_run():
    """A long stored response does not block the event loop."""
    engine = CachedEngine(ScriptedEngine(*"x" * 400).run_freely(), CacheConfig())
    await read(engine.stream(make_request("1")))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    busy = asyncio.create_task(other())
    assert "x" * 400 == text_of(await read(engine.stream(make_request("2"))))
    busy.cancel()

    assert turns > 10


async def test_everything_else_is_forwarded_to_the_inner_engine():
    """Facts, state, start, and what belongs to the tokenizer."""
    inner = EchoEngine()
    engine = CachedEngine(inner, CacheConfig())
    request = make_request("1", prompt_ids=None, text="hi")

    await engine.start()
    await engine.wait_ready()

    assert inner.info is engine.info
    assert inner.status() == engine.status()
    assert await inner.prepare(request) == await engine.prepare(request)
    assert "hi" == await engine.detokenize((104, 105))
