"""Merges the deltas of a request that does not stream, so that what stands around the engine handles few of them."""

from app.events import Delta

LOGPROBS_PER_DELTA = 16
"""Tokens with log-probabilities that are held back: more of them would hold up whoever encodes them."""


class DeltaMerger:
    """Lets the first delta through, and those that follow as one."""

    def __init__(self, *, streams: bool) -> None:
        """Args: streams: whether every delta is let through."""
        self._streams = streams
        self._begun = False
        self._held: list[Delta] = []
        self._scored = 0

    def feed(self, delta: Delta) -> Delta | None:
        """Return what is to be sent now; None for nothing yet."""
        if not delta.is_visible and not delta.tokens:
            return None
        self._held.append(delta)
        self._scored += len(delta.logprobs)
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
