"""Builds the deltas of a parsed completion, with the tokens that belong to each."""

from collections import deque
from collections.abc import Sequence

from msgspec import structs

from app.engine.parsing.output import Part
from app.events import Delta, DetokenizedLogprob, ToolCallDelta


class DeltaBuilder:
    """Follows the raw deltas of one completion and counts their tokens."""

    def __init__(self) -> None:
        self._raw = 0
        """Characters of the raw completion up to now."""
        self._logprobs: deque[tuple[int, DetokenizedLogprob]] = deque()
        """Tokens that have not been released, each with its end in the raw completion."""
        self._ends: list[int] = []
        """The end of every token in the raw completion."""

    def follow(self, delta: Delta) -> None:
        """Take note of the tokens of a raw delta."""
        self._logprobs.extend(
            (self._raw + end, token) for end, token in zip(delta.token_ends, delta.logprobs, strict=True)
        )
        # An engine that does not say where its tokens end has about as much text in each.
        ends = delta.ends or [len(delta.text) * number // delta.tokens for number in range(1, delta.tokens + 1)]
        self._ends.extend(self._raw + end for end in ends)
        self._raw += len(delta.text)

    def build(self, parts: Sequence[Part], *, tokens: int = 0, last: bool = False) -> Delta:
        """Return one delta of some parts.

        Args: tokens: how many tokens it counts; last: whether it releases all tokens that are left.
        """
        reached = self._raw if last else parts[-1].end if parts else -1
        released = []
        while self._logprobs and self._logprobs[0][0] <= reached:
            released.append(self._logprobs.popleft())
        return Delta(
            text="".join(part.text for part in parts),
            reasoning="".join(part.reasoning for part in parts),
            tool_calls=_merge(parts),
            tokens=tokens,
            logprobs=tuple(token for _, token in released),
            token_ends=tuple(_characters_before(end, parts) for end, _ in released),
        )

    def tokens_within(self, spans: Sequence[tuple[int, int]]) -> int:
        """Return how many tokens end within these spans of the raw completion."""
        return sum(start < end <= stop for start, stop in spans for end in self._ends)


def _characters_before(place: int, parts: Sequence[Part]) -> int:
    """Return how many characters of the answer in these parts stand before a place of the raw completion."""
    return sum(min(max(place - part.end + len(part.text), 0), len(part.text)) for part in parts)


def _merge(parts: Sequence[Part]) -> tuple[ToolCallDelta, ...]:
    """Return the calls of some parts, with arguments that follow each other as one."""
    merged: dict[int, list[ToolCallDelta]] = {}
    for part in parts:
        if part.call is not None:
            merged.setdefault(part.call.position, []).append(part.call)
    return tuple(
        calls[0] if len(calls) == 1 else structs.replace(calls[0], arguments="".join(call.arguments for call in calls))
        for calls in merged.values()
    )
