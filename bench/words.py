"""The language of the generated model: words of one token each, so that a text of n words is a prompt of n tokens.

Every word begins with its space and is made of syllables: two for the first 10,000, then three.  Pure; `bench.model`
builds the tokenizer from it, the loads draw their prompts from it.
"""

import random
from collections.abc import Iterator
from itertools import islice, product

VOCABULARY = 49_152
"""Tokens in all: control tokens, bytes, syllables and words."""
CONTROL = ("<|im_start|>", "<|im_end|>", "<|pad|>")
SYLLABLES = tuple(consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou")
BYTES = 256
FIRST_WORD = len(CONTROL) + BYTES + 2 * len(SYLLABLES)
"""Token id of the first word; syllables stand before it, without and with a space."""


def all_words() -> Iterator[str]:
    """Return every word, without its space, in the order of the token ids."""
    pairs = ["".join(pair) for pair in product(SYLLABLES, repeat=2)]
    triples = (pair + syllable for pair in pairs for syllable in SYLLABLES)
    yield from pairs
    yield from islice(triples, VOCABULARY - FIRST_WORD - len(pairs))


WORDS = tuple(all_words())


def text(draw: random.Random, words: int) -> str:
    """Draw a text of so many words, and tokens."""
    return "".join(f" {word}" for word in draw.choices(WORDS, k=words))


def token_ids(draw: random.Random, words: int) -> tuple[int, ...]:
    """Draw the tokens of such a text without the text."""
    return tuple(FIRST_WORD + draw.randrange(len(WORDS)) for _ in range(words))
