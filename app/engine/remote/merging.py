"""Merges deltas that arrive together, and those of a request that does not stream: what stands around the engine then
handles few of them."""

from app.events import Delta

LOGPROBS_PER_DELTA = 16
"""Tokens with log-probabilities that are held back: more of them would hold up whoever encodes them."""


class DeltaMerger:
    """Collects deltas until they are to be sent."""

    def __init__(self, *, streams: bool) -> None:
        """Args: streams: False lets the first text through, and what follows as one."""
        self._streams = streams
        self._begun = False
        self._held: list[Delta] = []
        self._scored = 0

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        if delta.is_visible or delta.tokens:
            self._held.append(delta)
            self._scored += len(delta.logprobs)

    def take(self) -> Delta | None:
        """Return what is to be sent now that nothing more is there to be read; None for nothing yet."""
        if not (self._streams or not self._begun or self._scored >= LOGPROBS_PER_DELTA):
            return None
        return self.finish() if any(each.is_visible for each in self._held) else None

    def finish(self) -> Delta | None:
        """Return what is held back."""
        held, self._held, self._scored = self._held, [], 0
        self._begun = self._begun or bool(held)
        if len(held) < 2:
            return held[0] if held else None
        ends: list[int] = []
        length = 0
        for delta in held:
            ends += [length + end for end in delta.token_ends]
            length += len(delta.text)
        return Delta(
            text="".join(delta.text for delta in held),
            reasoning="".join(delta.reasoning for delta in held),
            tool_calls=tuple(part for delta in held for part in delta.tool_calls),
            tokens=sum(delta.tokens for delta in held),
            logprobs=tuple(token for delta in held for token in delta.logprobs),
            token_ends=tuple(ends),
        )
