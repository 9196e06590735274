"""Special tokens that a parser has to see are shown in a form that no text has."""

import asyncio
from pathlib import Path

import pytest
from msgspec import structs
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from app.config import DeadlineConfig
from app.engine.live_request import LiveRequest
from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from app.engine.tokenizer.shown_tokens import ShownTokenDecoder, hide_tokens, show_token
from app.events import Event
from app.ipc.messages import TokenEvent
from tests.unit.engine.scripted import make_request
from tests.unit.event_streams import deltas_of
from tests.unit.tiny_models import chatml_tokenizer, metaspace_tokenizer, save, token_id

CALL = "<|tool_call|>"


class Marked:
    """A tokenizer with a special token for calls."""

    def __init__(self, original: PreTrainedTokenizerFast, folder: Path) -> None:
        original.add_tokens([AddedToken(CALL, special=True, normalized=False)], special_tokens=True)
        self.original = original
        self.call = token_id(original, CALL)
        self.loaded = HfTokenizer(save(original, folder))

    def encode(self, text: str) -> list[int]:
        return list(self.original.encode(text, add_special_tokens=False))

    def decode(self, prompt: list[int], completion: list[int], *, step: int = 1) -> str:
        decoder = ShownTokenDecoder(self.loaded, prompt, [(CALL, self.call)])
        chunks = [completion[at : at + step] for at in range(0, len(completion), step)]
        return "".join([*map(decoder.feed, chunks), decoder.finish()])


@pytest.fixture(scope="module", params=[chatml_tokenizer, metaspace_tokenizer], ids=["byte-level", "metaspace"])
def marked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Marked:
    return Marked(request.param(), tmp_path_factory.mktemp("marked"))


@pytest.mark.parametrize("step", [1, 100])
def test_a_special_token_stands_between_noncharacters(marked: Marked, step: int):
    """And the text on both sides of it is what it is without."""
    before, behind = marked.encode("hello the end"), marked.encode("the world")

    text = marked.decode(before, [*marked.encode(" hello"), marked.call, *behind, marked.call], step=step)

    shown = show_token(CALL)
    head, middle, tail = text.split(shown)
    assert ("hello", "the world", "") == (head.strip(), middle.strip(), tail)
    assert hide_tokens(text) == head + middle


def test_text_that_spells_the_token_is_text(marked: Marked):
    """The same letters as ordinary tokens are shown as they are."""
    letters = list(marked.loaded.encode_text(CALL))

    text = marked.decode([], letters)

    assert marked.call not in letters
    assert show_token(CALL) not in text
    assert text == hide_tokens(text)


def test_a_broken_character_before_the_token_is_replaced(tmp_path: Path):
    """Nothing of a character waits for bytes behind the token."""
    marked = Marked(chatml_tokenizer(), tmp_path)
    part = marked.encode("é")[:1]

    assert f"\ufffd{show_token(CALL)}a" == marked.decode([], [*part, marked.call, *marked.encode("a")])


def test_a_text_cannot_pretend_to_show_a_token(tmp_path: Path):
    """The noncharacters of the form are replaced where the model writes them itself."""
    marked = Marked(chatml_tokenizer(), tmp_path)

    text = marked.decode([], marked.encode(show_token("x")))

    assert "\ufffdx\ufffd" == text


async def test_deltas_say_where_each_token_ends(tmp_path: Path):
    """Only where somebody parses them; a delta of several tokens has as many ends, within its own text."""
    marked = Marked(chatml_tokenizer(), tmp_path)
    ids = [*marked.encode("hello"), marked.call, *marked.encode("é"), *marked.encode(" the end")]
    request = make_request("1", shown_tokens=((CALL, marked.call),))

    for each in (request, structs.replace(request, shown_tokens=None)):
        live = LiveRequest(1, each, marked.loaded, DeadlineConfig(), lambda live: None)
        events: list[Event] = []

        async def follow(live: LiveRequest, events: list[Event]) -> None:
            async for event in live.events():
                events.append(event)

        task = asyncio.create_task(follow(live, events))
        for chunk in (ids[:1], ids[1:4], ids[4:]):
            live.accept(TokenEvent(id=1, token_ids=tuple(chunk)))
            await asyncio.sleep(0.01)
        live.accept(TokenEvent(id=1, token_ids=(), finish="stop"))
        await task

        deltas = deltas_of(events)
        if each.shown_tokens is None:
            assert {()} == {delta.ends for delta in deltas}
            assert "hello\u00e9 the end" == "".join(delta.text for delta in deltas)
            continue
        position, ends = 0, []
        for delta in deltas:
            ends += [position + end for end in delta.ends]
            position += len(delta.text)
        text = "".join(delta.text for delta in deltas)
        assert f"hello{show_token(CALL)}é the end" == text
        assert len(ids) == len(ends)
        assert ends == sorted(ends)
        assert len(f"hello{show_token(CALL)}") == ends[ids.index(marked.call)]
        assert len(text) == ends[-1]
