"""Fitting a prompt into the context window."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from app.engine.base import PreparedPrompt
from app.engine.echo import EchoEngine
from app.errors import ContextLengthExceeded, InvalidRequest
from app.generation.context_window import TokenBudget, fit_chat, fit_text, trimmable
from app.generation.sessions import Turn
from app.requests import GenerationRequest
from app.types import Message, Role, Tenant

TEXT = GenerationRequest(id="1", tenant=Tenant.owner("t"), text="")
CHAT = GenerationRequest(id="1", tenant=Tenant.owner("t"), messages=(Message(Role.SYSTEM, "sys"),))
ENGINE = EchoEngine()


def turn(user: str, assistant: str) -> Turn:
    return Turn((Message(Role.USER, user), Message(Role.ASSISTANT, assistant)))


def says(text: str) -> list[Message]:
    return [Message(Role.USER, text)]


# A token of the echo engine is one character, and each message has one more.


@given(
    history=st.lists(st.builds(turn, st.text("a", max_size=30), st.text("b", max_size=30)), max_size=8),
    new=st.text("c", min_size=1, max_size=30),
    limit=st.integers(60, 400),
    requested=st.one_of(st.none(), st.integers(1, 20)),
)
async def test_the_most_recent_turns_that_fit_are_in_the_prompt_and_the_completion_has_its_tokens(
    history: list[Turn], new: str, limit: int, requested: int | None
) -> None:
    """Prompt and completion never pass the limit, and one more turn would."""
    budget = TokenBudget(limit=limit, requested=requested, default=64)

    fitted = await fit_chat(CHAT, history, says(new), ENGINE.prepare, budget)

    def tokens(turns: int) -> int:
        messages = [message for one in history[len(history) - turns :] for message in one.messages] + says(new)
        return len("sys") + 2 + sum(len(message.content) + 1 for message in messages)

    context = fitted.context
    assert context is not None
    assert fitted.prompt_tokens == context.prompt_tokens == tokens(context.turns_kept)
    assert fitted.prompt_tokens + fitted.max_tokens <= limit == context.limit
    assert context.turns_kept + context.turns_dropped == len(history)
    assert context.turns_dropped == 0 or tokens(context.turns_kept + 1) + budget.reserved > limit
    assert requested is None or fitted.max_tokens == requested


async def test_the_fitted_request_has_the_ids_of_its_messages() -> None:
    """They are what was counted; the messages stand beside them, with those that are new."""
    history = [turn("1", "2"), turn("3", "4")]
    budget = TokenBudget(limit=100, requested=10, default=64)

    fitted = await fit_chat(CHAT, history, says("new"), ENGINE.prepare, budget)

    messages = (*CHAT.messages, *history[0].messages, *history[1].messages, *says("new"))
    assert messages == fitted.request.messages
    assert ENGINE.tokenizer.encode_chat(messages) == fitted.request.prompt_ids
    assert tuple(says("new")) == fitted.new


async def test_a_prompt_that_is_encoded_elsewhere_is_fitted_by_its_estimate() -> None:
    """Its text or messages go on to the engine, without ids."""

    async def estimate(request: GenerationRequest) -> PreparedPrompt:
        return PreparedPrompt(prompt_tokens=90, prompt_ids=None)

    budget = TokenBudget(limit=100, requested=None, default=64)

    text = await fit_text(structs.replace(TEXT, text="hello"), estimate, budget)
    talk = await fit_chat(CHAT, [], says("hello"), estimate, budget)

    assert [(90, 10, None)] * 2 == [
        (fitted.prompt_tokens, fitted.max_tokens, fitted.request.prompt_ids) for fitted in (text, talk)
    ]


async def test_new_messages_that_cannot_fit_are_refused_with_both_numbers() -> None:
    """No history is left to drop, so the request itself is too long."""
    budget = TokenBudget(limit=40, requested=10, default=64)

    with pytest.raises(ContextLengthExceeded) as refused:
        await fit_chat(CHAT, [turn("a", "b")], says("c" * 40), ENGINE.prepare, budget)

    assert {"prompt_tokens": 46, "max_tokens": 10, "limit": 40} == refused.value.details


@pytest.mark.parametrize(("length", "fits"), [(89, True), (90, True), (91, False)])
async def test_the_boundary_of_the_context_window_is_exact(length: int, fits: bool) -> None:
    """Prompt and max_tokens may fill the window to the last token, and no further."""
    budget = TokenBudget(limit=100, requested=10, default=64)
    request = structs.replace(TEXT, text="x" * length)

    if fits:
        fitted = await fit_text(request, ENGINE.prepare, budget)
        assert (length, 10) == (fitted.prompt_tokens, fitted.max_tokens)
        assert (ord("x"),) * length == fitted.request.prompt_ids
    else:
        with pytest.raises(ContextLengthExceeded):
            await fit_text(request, ENGINE.prepare, budget)


async def test_a_completion_without_a_limit_of_its_own_gives_way_to_the_prompt() -> None:
    """Without max_tokens the default is cut to what is left of the window."""
    budget = TokenBudget(limit=100, requested=None, default=64)

    fitted = await fit_text(structs.replace(TEXT, text="x" * 95), ENGINE.prepare, budget)

    assert (95, 5) == (fitted.prompt_tokens, fitted.max_tokens)


async def test_a_prompt_without_a_token_is_refused_by_name() -> None:
    """There is nothing that a model could continue."""
    with pytest.raises(InvalidRequest) as refused:
        await fit_text(TEXT, ENGINE.prepare, TokenBudget(limit=100, requested=None, default=64))

    assert "prompt" == refused.value.details["errors"][0]["field"]


class CountingEngine(EchoEngine):
    """Counts what it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[int] = []

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        prepared = await super().prepare(request)
        self.encoded.append(prepared.prompt_tokens)
        return prepared


async def test_a_history_many_times_as_long_as_the_window_is_never_encoded_whole() -> None:
    """The work is bounded by the window, not by what a session stores; no length is encoded twice."""
    engine = CountingEngine()
    history = [turn("u" * 50, "a" * 50)] * 1000
    budget = TokenBudget(limit=1000, requested=100, default=64)

    fitted = await fit_chat(CHAT, history, says("new"), engine.prepare, budget)

    assert fitted.context is not None
    assert 8 == fitted.context.turns_kept
    assert max(engine.encoded) < 3000
    assert len(set(engine.encoded)) == len(engine.encoded)


@pytest.mark.parametrize("turns", [0, 1, 20])
async def test_a_history_that_fits_is_encoded_once(turns: int) -> None:
    """A guess by its bytes says that all of it is likely to fit."""
    engine = CountingEngine()
    budget = TokenBudget(limit=1000, requested=100, default=64)

    fitted = await fit_chat(CHAT, [turn("hello", "well")] * turns, says("new"), engine.prepare, budget)

    assert [fitted.prompt_tokens] == engine.encoded


@given(
    limit=st.integers(2, 60),
    default=st.integers(1, 80),
    requested=st.none() | st.integers(1, 70),
    prompt=st.integers(1, 70),
    samples=st.integers(1, 8),
)
def test_the_fewest_tokens_of_a_request_are_no_more_than_any_prompt_makes_it_take(
    limit: int, default: int, requested: int | None, prompt: int, samples: int
) -> None:
    """A prompt of one token or the longest takes exactly so many; what never fits takes none and is refused as such."""
    budget = TokenBudget(limit=limit, requested=requested, default=default)

    def most_tokens(prompt_tokens: int) -> int | None:
        try:
            return prompt_tokens + samples * budget.max_tokens(prompt_tokens)
        except ContextLengthExceeded:
            return None

    possible = [tokens for tokens in map(most_tokens, range(1, limit + 1)) if tokens is not None]
    assert budget.least_tokens(samples) == min(possible, default=0)
    assert budget.least_tokens(samples) <= (most_tokens(prompt) or limit * samples)


@pytest.mark.parametrize(("truncate", "expected"), [(0, 90), (30, 30), (500, 90), (None, None)])
async def test_the_beginning_of_a_text_goes_where_the_caller_says_so(
    truncate: int | None, expected: int | None
) -> None:
    """Its last tokens are what is left: as many as named, or as fit beside max_tokens."""
    budget = TokenBudget(limit=100, requested=10, default=64)
    request = structs.replace(TEXT, text="".join(map(chr, range(200, 400))), truncate_prompt=truncate)

    if expected is None:
        with pytest.raises(ContextLengthExceeded):
            await fit_text(request, ENGINE.prepare, budget)
        return
    fitted = await fit_text(request, ENGINE.prepare, budget)

    assert (expected, 10) == (fitted.prompt_tokens, fitted.max_tokens)
    assert tuple(range(400 - expected, 400)) == fitted.request.prompt_ids


async def test_tokens_that_stand_in_front_of_every_text_are_never_cut() -> None:
    """As the token at the beginning of a text, without which some models write nonsense."""

    async def prepare(request: GenerationRequest) -> PreparedPrompt:
        ids = (1, *map(ord, request.text or ""))
        return PreparedPrompt(prompt_tokens=len(ids), prompt_ids=ids)

    budget = TokenBudget(limit=20, requested=10, default=64)

    fitted = await fit_text(structs.replace(TEXT, text="abcdefghijklmnop", truncate_prompt=0), prepare, budget)

    assert (1, *map(ord, "hijklmnop")) == fitted.request.prompt_ids


async def test_what_was_not_encoded_has_at_least_so_many_tokens() -> None:
    """The refusal says that it did not count them all."""

    async def bound(request: GenerationRequest) -> PreparedPrompt:
        return PreparedPrompt(prompt_tokens=700, prompt_ids=None, is_lower_bound=True)

    budget = TokenBudget(limit=100, requested=10, default=64)

    for fitting in (
        fit_text(structs.replace(TEXT, text="x"), bound, budget),
        fit_chat(CHAT, [], says("x"), bound, budget),
    ):
        with pytest.raises(ContextLengthExceeded) as refused:
            await fitting
        assert "at least 710: at least 700 for the prompt and 10 for the completion" in refused.value.message


def spoken(*texts: str) -> list[Message]:
    """Return messages of user and assistant in turn; `!` is the system's."""
    roles = {"u": Role.USER, "a": Role.ASSISTANT, "!": Role.SYSTEM, "t": Role.TOOL}
    return [Message(roles[text[0]], text) for text in texts]


@pytest.mark.parametrize(
    ("texts", "turns"),
    [
        (["u1"], [["u1"]]),
        (["u1", "a1", "u2"], [["u1", "a1"], ["u2"]]),
        (["u1", "a1", "t1", "a2", "u2", "a3"], [["u1", "a1", "t1", "a2"], ["u2", "a3"]]),
        (["a0", "u1", "a1", "u2"], [["a0"], ["u1", "a1"], ["u2"]]),
        (["u1", "a1", "!x", "u2"], [["u1", "a1"], ["!x", "u2"]]),
        (["u1", "a1", "u2", "!x"], [["u1", "a1"], ["u2", "!x"]]),
    ],
)
def test_a_conversation_gives_way_by_whole_turns(texts: list[str], turns: list[list[str]]) -> None:
    """The last turn never does; a system message belongs to the turn that it introduces."""
    request = structs.replace(CHAT, truncate_prompt=0)

    history, new = trimmable(request, [turn("0", "0")], spoken(*texts))

    assert turns[-1] == [message.content for message in new]
    assert turns[:-1] == [[message.content for message in each.messages] for each in history[1:]]


def test_all_new_messages_stay_unless_the_caller_lets_them_go() -> None:
    history, new = trimmable(CHAT, [], spoken("u1", "a1", "u2"))

    assert ([], ["u1", "a1", "u2"]) == (list(history), [message.content for message in new])


async def test_a_limit_of_the_caller_below_its_last_turn_is_refused() -> None:
    budget = TokenBudget(limit=100, requested=10, default=64)
    request = structs.replace(CHAT, truncate_prompt=20)

    with pytest.raises(InvalidRequest) as refused:
        await fit_chat(request, [turn("a", "b")], says("c" * 40), ENGINE.prepare, budget)

    assert (
        "truncate_prompt_tokens is less than the 46 tokens of the last turn, which is never cut"
        == refused.value.message
    )
