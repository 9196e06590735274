"""Turn examples of the tiny chat model's text into tokens, and make the tokenizer that does it.

The tokens of a conversation are those that `tokenizer.apply_chat_template` gives when the model answers; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from corpus import Example
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTEXT_TOKENS = 2048

CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""

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


class Encoder:
    """Encodes examples as (ids, learnt): the tokens, and for each whether the model learns to write it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._start, self._end, self._stop = (self._backend.token_to_id(t) for t in (TURN_START, TURN_END, END_OF_TEXT))
        self._heads = {role: [self._start, *self._ids(f"{role}\n")] for role in ("system", "user", "assistant")}
        self._newline = self._ids("\n")

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode(self, examples: Sequence[Example]) -> list[tuple[list[int], list[bool]]]:
        """Encode a batch, in order; examples longer than the context are cut at its end."""
        texts = [
            text
            for each in examples
            for text in ([each.given, each.text] if each.text else [turn.content for turn in each.turns])
        ]
        encoded = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [self._one(each, encoded) for each in examples]

    def _one(self, each: Example, encoded: Iterable[object]) -> tuple[list[int], list[bool]]:
        encodings = iter(encoded)
        if each.text:
            given = list(next(encodings).ids)  # type: ignore[attr-defined]
            ids = [*given, *next(encodings).ids, self._stop]  # type: ignore[attr-defined]
            # The first token has nothing before it to be guessed from.
            unlearnt = max(len(given), 1)
            return ids, [False] * unlearnt + [True] * (len(ids) - unlearnt)
        ids, learnt = [], []
        for turn in each.turns:
            head, content = self._heads[turn.role], [*next(encodings).ids, self._end]  # type: ignore[attr-defined]
            ids += head + content + self._newline
            learnt += [False] * len(head) + [turn.learn] * len(content) + [False] * len(self._newline)
        return ids[:CONTEXT_TOKENS], learnt[:CONTEXT_TOKENS]
