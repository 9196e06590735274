"""Fitting a conversation into the context window."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine.echo import EchoTokenizer
from app.errors import ContextLengthExceeded
from app.generation.context_window import Room, fit_chat, fit_text
from app.generation.sessions import Turn
from app.types import Message, Role


def turn(user: str, assistant: str) -> Turn:
    return Turn((Message(Role.USER, user), Message(Role.ASSISTANT, assistant)))


def ask(text: str) -> list[Message]:
    return [Message(Role.USER, text)]


# A token of the echo tokenizer is one character, and each message has one more.


@given(
    history=st.lists(st.builds(turn, st.text("a", max_size=30), st.text("b", max_size=30)), max_size=8),
    new=st.text("c", min_size=1, max_size=30),
    limit=st.integers(60, 400),
    asked=st.one_of(st.none(), st.integers(1, 20)),
)
async def test_the_most_recent_turns_that_fit_are_kept_and_the_answer_has_its_room(
    history: list[Turn], new: str, limit: int, asked: int | None
) -> None:
    """Prompt and answer never pass the limit, and one more kept turn would."""
    room = Room(limit=limit, asked=asked, default=64)

    window = await fit_chat(EchoTokenizer(), "sys", history, ask(new), room)

    def tokens(kept: int) -> int:
        messages = [message for one in history[len(history) - kept :] for message in one.messages] + ask(new)
        return len("sys") + 2 + sum(len(message.content) + 1 for message in messages)

    assert window.prompt_tokens == tokens(window.turns_kept)
    assert window.prompt_tokens + window.max_tokens <= limit
    assert window.turns_kept + window.turns_dropped == len(history)
    assert window.turns_dropped == 0 or tokens(window.turns_kept + 1) + room.reserve > limit
    assert asked is None or window.max_tokens == asked


async def test_new_messages_that_cannot_fit_are_refused_with_both_numbers() -> None:
    """No history is left to drop, so the request itself is too long."""
    room = Room(limit=40, asked=10, default=64)

    with pytest.raises(ContextLengthExceeded) as refused:
        await fit_chat(EchoTokenizer(), "sys", [turn("a", "b")], ask("c" * 40), room)

    assert {"prompt_tokens": 46, "max_tokens": 10, "limit": 40} == refused.value.details


@pytest.mark.parametrize(("length", "fits"), [(89, True), (90, True), (91, False)])
async def test_the_boundary_of_the_context_window_is_exact(length: int, fits: bool) -> None:
    """Prompt and max_tokens may fill the window to the last token, and no further."""
    room = Room(limit=100, asked=10, default=64)

    if fits:
        assert (length, 10) == await fit_text(EchoTokenizer(), "x" * length, room)
    else:
        with pytest.raises(ContextLengthExceeded):
            await fit_text(EchoTokenizer(), "x" * length, room)


async def test_an_answer_of_no_named_length_gives_way_to_the_prompt() -> None:
    """Without max_tokens the default is cut to what is left of the window."""
    assert (95, 5) == await fit_text(EchoTokenizer(), "x" * 95, Room(limit=100, asked=None, default=64))


async def test_a_history_many_times_as_long_as_the_window_is_never_encoded_whole() -> None:
    """The work is bounded by the window, not by what a session keeps."""

    class Counting(EchoTokenizer):
        longest = 0

        def encode_chat(self, messages: Sequence[Message], *, go_on: bool = False) -> tuple[int, ...]:
            ids = super().encode_chat(messages, go_on=go_on)
            self.longest = max(self.longest, len(ids))
            return ids

    tokenizer = Counting()
    history = [turn("u" * 50, "a" * 50)] * 1000

    window = await fit_chat(tokenizer, "sys", history, ask("new"), Room(limit=1000, asked=100, default=64))

    assert 8 == window.turns_kept
    assert tokenizer.longest < 3000
