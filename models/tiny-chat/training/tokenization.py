"""Turn examples of the tiny chat model's text into tokens, and make the tokenizer that does it.

The tokens of a conversation are those that `tokenizer.apply_chat_template` gives when the model answers; a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from turns import Example, Span, Tool, ToolCall, Turn

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTEXT_TOKENS = 2048

CHAT_TEMPLATE = (Path(__file__).parents[1] / "chat_template.jinja").read_text(encoding="utf-8")

# A lower-case word takes the space before it along.  Capitals, digits, marks and spaces stand alone, so that a name or a number is the same
# tokens wherever it occurs, which makes it easy to copy.
PRETOKEN_PATTERN = r" ?\p{Ll}+|\p{Lu}\p{Ll}*|[\p{L}\p{M}]|\p{N}|\s|[^\s\p{L}\p{N}]"


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts; `vocabulary` counts its tokens, the four control tokens included."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, TURN_START],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@dataclass(frozen=True)
class _Written:
    """A turn as the chat template writes it."""

    role: str
    text: str
    learn: bool
    dictated: tuple[Span, ...] = ()


def written_tool(tool: Tool) -> str:
    """The line that describes a tool."""
    described = {"description": tool.description} if tool.description else {}
    return json.dumps({"name": tool.name, **described, "parameters": tool.parameters}, ensure_ascii=False)


def written_call(call: ToolCall) -> str:
    """A call in the Hermes form."""
    return (
        f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': call.arguments}, ensure_ascii=False)}\n</tool_call>"
    )


def _written_turn(turn: Turn) -> _Written:
    if turn.role == "tool":
        return _Written("user", f"<tool_response>\n{turn.content}\n</tool_response>", turn.learn)
    parts = [turn.content] if turn.content or not turn.calls else []
    return _Written(turn.role, "\n".join([*parts, *map(written_call, turn.calls)]), turn.learn, turn.dictated)


def _written_turns(one: Example) -> list[_Written]:
    """The turns as the chat template writes them: tools behind the system text, results that follow each other as one."""
    turns = list(one.turns)
    if one.tools:
        first = turns.pop(0).content + "\n\n" if turns and turns[0].role == "system" and turns[0].content else ""
        lines = "\n".join(map(written_tool, one.tools))
        turns.insert(0, Turn("system", f"{first}<tools>\n{lines}\n</tools>"))
    written: list[_Written] = []
    before = ""
    for turn in turns:
        each = _written_turn(turn)
        if turn.role == before == "tool":
            each = _Written("user", f"{written.pop().text}\n{each.text}", each.learn)
        written.append(each)
        before = turn.role
    return written


class Encoder:
    """Encodes examples as (ids, learnt): the tokens, and for each whether the model learns to write it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._start, self._end, self._stop = map(self._id, (TURN_START, TURN_END, END_OF_TEXT))
        self._heads = {role: [self._start, *self._ids(f"{role}\n")] for role in ("system", "user", "assistant")}
        self._newline = self._ids("\n")

    def _id(self, token: str) -> int:
        number = self._backend.token_to_id(token)
        assert number is not None
        return int(number)

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode(self, examples: Sequence[Example]) -> list[tuple[list[int], list[bool]]]:
        """Encode a batch, in order; examples longer than the context are cut at its end."""
        turns = [_written_turns(each) for each in examples]
        texts = [
            text
            for each, written in zip(examples, turns, strict=True)
            for text in ([each.given, each.text] if each.text else [turn.text for turn in written])
        ]
        encoded: Iterator[Any] = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [
            self._document(encoded) if each.text else self._conversation(written, encoded)
            for each, written in zip(examples, turns, strict=True)
        ]

    def _document(self, encoded: Iterator[Any]) -> tuple[list[int], list[bool]]:
        given = list(next(encoded).ids)
        ids = [*given, *next(encoded).ids, self._stop]
        # The first token has nothing before it to be guessed from.
        unlearnt = max(len(given), 1)
        return ids, [False] * unlearnt + [True] * (len(ids) - unlearnt)

    def _conversation(self, turns: Sequence[_Written], encoded: Iterator[Any]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learnt: list[bool] = []
        for turn in turns:
            head, encoding = self._heads[turn.role], next(encoded)
            ids += [*head, *encoding.ids, self._end, *self._newline]
            chosen = [
                turn.learn and not any(first <= start < last for first, last in turn.dictated)
                for start, _ in encoding.offsets
            ]
            learnt += [False] * len(head) + chosen + [turn.learn] + [False] * len(self._newline)
        return ids[:CONTEXT_TOKENS], learnt[:CONTEXT_TOKENS]
