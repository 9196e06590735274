"""A prompt that takes long to encode is ended, and holds up nobody else."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from app.engine.echo import EchoTokenizer
from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from app.engine.tokenizer.prepare import THREADS, PromptEncoder
from app.engine.tokenizer.token_length import TokenLength
from app.errors import DeadlineExceeded, InvalidRequest
from app.requests import GenerationRequest
from app.types import Message, Role, Tenant
from tests.unit.tiny_models import chatml_tokenizer, save
from tests.waiting import START_SECONDS, until


class StuckTokenizer(EchoTokenizer):
    """Encodes, but for one text, on which it waits for the test to end."""

    inline_chars = 0
    length = TokenLength(None, None)

    def __init__(self) -> None:
        self.free = threading.Event()

    def encode_text(self, text: str) -> tuple[int, ...]:
        if text == "stuck":
            self.free.wait()
        return super().encode_text(text)

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> tuple[int, ...]:
        return self.encode_text(messages[0].content)

    def close(self) -> None:
        self.free.set()


@pytest.fixture
def stuck() -> Iterator[StuckTokenizer]:
    tokenizer = StuckTokenizer()
    yield tokenizer
    tokenizer.close()


def prompt(text: str) -> GenerationRequest:
    return GenerationRequest(id="one", tenant=Tenant.owner("tenant"), text=text)


async def test_prompts_that_do_not_end_leave_the_others_their_threads(stuck: StuckTokenizer):
    """Each of them ends at its deadline; those beside it are encoded meanwhile."""
    encoder = PromptEncoder(stuck, vocab_size=2**21, seconds=2)
    waiting = [asyncio.create_task(encoder.encode(prompt("stuck"))) for _ in range(THREADS - 1)]
    others = [await encoder.encode(prompt("hello")) for _ in range(20)]
    still_waiting = not any(task.done() for task in waiting)

    outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    assert {5} == {each.prompt_tokens for each in others}
    assert still_waiting
    assert [DeadlineExceeded] * (THREADS - 1) == [type(each) for each in outcomes]


async def test_a_prompt_that_waits_for_a_thread_ends_at_its_deadline_too(stuck: StuckTokenizer):
    """And is never encoded, since nobody waits for it."""
    encoder = PromptEncoder(stuck, vocab_size=2**21, seconds=0.3)
    waiting = [encoder.encode(prompt("stuck")) for _ in range(THREADS)]
    outcomes = await asyncio.gather(*waiting, encoder.encode(prompt("hello")), return_exceptions=True)
    stuck.free.set()

    assert [DeadlineExceeded] * (THREADS + 1) == [type(each) for each in outcomes]
    assert 5 == (await encoder.encode(prompt("later"))).prompt_tokens


@pytest.mark.parametrize("turns", range(6))
async def test_a_request_that_is_cancelled_as_its_prompt_has_been_encoded_ends(stuck: StuckTokenizer, turns: int):
    """However many turns of the event loop the result is on its way by then."""
    encoder = PromptEncoder(stuck, vocab_size=2**21, seconds=START_SECONDS)
    encoding = asyncio.create_task(encoder.encode(prompt("stuck")))
    await asyncio.sleep(0.05)
    stuck.free.set()
    time.sleep(0.05)  # noqa: ASYNC251  # the thread has its result, and the loop has not seen it
    for _ in range(turns):
        await asyncio.sleep(0)

    accepted = encoding.cancel()
    await asyncio.wait([encoding])

    assert accepted is encoding.cancelled()


async def test_a_token_that_the_model_lacks_is_the_requests_fault():
    """The tokenizer knows it, but the same text would fail again."""
    encoder = PromptEncoder(StuckTokenizer(), vocab_size=ord("h"), seconds=5)

    assert (await encoder.encode(prompt("abc"))).prompt_ids
    with pytest.raises(InvalidRequest, match="no token"):
        await encoder.encode(prompt("hello"))


async def test_threads_end_with_their_encoder(stuck: StuckTokenizer):
    """Those that are free do, at once."""
    encoder = PromptEncoder(stuck, vocab_size=2**21, seconds=5)
    before = set(threading.enumerate())
    await encoder.encode(prompt("hello"))
    started = set(threading.enumerate()) - before
    assert started

    encoder.close()

    await until(lambda: not any(thread.is_alive() for thread in started))


def test_a_stuck_thread_does_not_keep_the_process_from_ending():
    """The interpreter ends although a prompt is still being encoded."""
    code = (
        "import asyncio, time\n"
        "from app.engine.tokenizer.prepare import PromptEncoder\n"
        "from tests.unit.engine.test_prepare import StuckTokenizer, prompt, DeadlineExceeded\n"
        "async def main():\n"
        "    try: await PromptEncoder(StuckTokenizer(), vocab_size=9**9, seconds=0.1).encode(prompt('stuck'))\n"
        "    except DeadlineExceeded: print('ended')\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=START_SECONDS, check=True
    )

    assert "ended\n" == done.stdout


def backtracking_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose expression tries every way to part a run of letters."""
    backend = Tokenizer(models.BPE())
    slow = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([slow, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=260, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["hello"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def test_a_text_that_an_expression_gives_up_on_is_the_requests_fault(tmp_path: Path):
    """The expression's engine gives up after millions of attempts; that is no failure of the service."""
    tokenizer = HfTokenizer(save(backtracking_tokenizer(), tmp_path))
    bad = "a" * 40 + "b"

    with pytest.raises(InvalidRequest, match="cannot encode"):
        tokenizer.encode_text(bad)
    with pytest.raises(InvalidRequest, match="cannot encode"):
        tokenizer.encode_chat([Message(Role.USER, bad)])
    assert tokenizer.encode_text("hello")
    tokenizer.close()


def test_only_texts_that_cannot_take_long_are_encoded_on_the_event_loop(tmp_path: Path):
    """A tokenizer with an expression that may backtrack encodes even short texts in a thread."""
    slow, plain = (
        HfTokenizer(save(each(), tmp_path / each.__name__)) for each in (backtracking_tokenizer, chatml_tokenizer)
    )

    assert 0 == slow.inline_chars
    assert plain.inline_chars > 0
    slow.close()
    plain.close()


class CountingTokenizer(EchoTokenizer):
    """Takes a while for each prompt, and notes in which order they come."""

    inline_chars = 0
    length = TokenLength(None, None)

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode_text(self, text: str) -> tuple[int, ...]:
        self.encoded.append(text)
        time.sleep(0.01)
        return super().encode_text(text)

    def close(self) -> None:
        pass


async def test_tenants_take_turns_in_having_their_prompts_encoded():
    """A tenant's prompt waits for a few of another's that has sent hundreds, and not for all of them."""
    tokenizer = CountingTokenizer()
    encoder = PromptEncoder(tokenizer, vocab_size=2**21, seconds=30)
    flood = [asyncio.create_task(encoder.encode(prompt(f"flood {number}"))) for number in range(100)]
    await until(lambda: len(tokenizer.encoded) >= THREADS)
    other = GenerationRequest(id="other", tenant=Tenant.owner("other"), text="small")
    before = len(tokenizer.encoded)

    prepared = await encoder.encode(other)
    served = tokenizer.encoded.index("small")
    await asyncio.gather(*flood)

    assert 5 == prepared.prompt_tokens
    assert served - before <= 5 * THREADS
    assert sorted(["small", *(f"flood {number}" for number in range(100))]) == sorted(tokenizer.encoded)
