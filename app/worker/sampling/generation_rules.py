"""What a model's makers forbid or favour at every token, as its generation_config.json says.

Decides which tokens the rules rule out or bias next, for one sequence.  Pure: plain numbers, no tensors.  Called by
`sampler.py`; the serial runner hands the same rules to transformers.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRules:
    """The rules of one model; every id is one of its tokens."""

    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    """Never the first token of a completion."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences that are never completed."""
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    """Added to the score of the last token of a sequence where the others stand before it."""
    no_repeat_ngram_size: int = 0
    """No so many tokens in a row come twice, those of the prompt counted; 0 is off."""

    def __bool__(self) -> bool:
        """Return whether there is any rule."""
        return self != NO_RULES

    @property
    def digest(self) -> str | None:
        """Return a text that changes with the rules; None where there are none."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16] if self else None


NO_RULES = GenerationRules()


class RuleState:
    """The rules as they apply to one sequence, from token to token."""

    def __init__(self, rules: GenerationRules, prompt_ids: Sequence[int]) -> None:
        self._rules = rules
        self._biases = (*rules.sequence_bias, *((ids, -math.inf) for ids in rules.bad_words_ids))
        self._tokens: list[int] = []
        """All up to now."""
        self._sampled = 0
        self._followers: dict[tuple[int, ...], set[int]] = {}
        """The tokens that have stood behind each run of `no_repeat_ngram_size` - 1."""
        for token in prompt_ids:
            self._append(token)

    def accept(self, token: int) -> None:
        """Record that this token was appended."""
        self._sampled += 1
        self._append(token)

    def masked(self) -> set[int]:
        """Return the tokens that may not come next."""
        rules = self._rules
        masked = {token for token, bias in self._matching() if bias == -math.inf}
        masked.update(rules.suppress_tokens)
        if not self._sampled:
            masked.update(rules.begin_suppress_tokens)
        if rules.no_repeat_ngram_size:
            masked |= self._followers.get(self._end(rules.no_repeat_ngram_size - 1), set())
        return masked

    def biases(self) -> dict[int, float]:
        """Return what is added to the scores of which tokens; those that are masked are left out."""
        biases: dict[int, float] = {}
        for token, bias in self._matching():
            if bias != -math.inf:
                biases[token] = biases.get(token, 0.0) + bias
        return biases

    def _matching(self) -> Iterator[tuple[int, float]]:
        for sequence, bias in self._biases:
            if self._end(len(sequence) - 1) == sequence[:-1]:
                yield sequence[-1], bias

    def _append(self, token: int) -> None:
        size = self._rules.no_repeat_ngram_size
        if size and len(self._tokens) >= size - 1:
            self._followers.setdefault(self._end(size - 1), set()).add(token)
        self._tokens.append(token)

    def _end(self, count: int) -> tuple[int, ...]:
        """Return the last tokens; fewer where there are no more, which is no run of so many."""
        return tuple(self._tokens[len(self._tokens) - count :]) if 0 < count <= len(self._tokens) else ()
