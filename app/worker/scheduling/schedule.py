"""The data of one model step: how many tokens of which sequences, and which prefixes are copied first."""

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's token ids and how far its KV cache has come."""

    request_id: int
    tenant: str
    token_ids: list[int]
    """The prompt, then the tokens sampled so far."""
    prompt_tokens: int
    slot: int | None = None
    """The KV cache slot that holds its keys and values; None while it waits."""
    computed_tokens: int = 0
    """Tokens, from the first, whose keys and values are in the slot."""
    cached_tokens: int = 0
    """Tokens that were in the KV cache already when the sequence first got a slot."""
    started: bool = False
    """Whether it ever had a slot."""
    last_step: int = 0
    """The step that last computed one of its tokens."""
    adapter: str | None = None
    priority: int = 0
    """Lower is served first."""

    @property
    def cache_owner(self) -> tuple[str, str | None]:
        """Whose KV cache it may reuse: only that of the same tenant, computed with the same adapter."""
        return self.tenant, self.adapter

    @property
    def uncomputed_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) - self.computed_tokens


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """The next `count` tokens of a sequence, to be computed in this step."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether the next token can be sampled afterwards."""
        return self.count == self.sequence.uncomputed_tokens


@dataclass(frozen=True, slots=True)
class PrefixCopy:
    """A copy of the first `count` tokens' keys and values from one slot to another, made before the step."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The tokens that one model step computes."""

    tokens: list[ScheduledTokens]
    """Decode tokens first, by slot; then prefill chunks.  Empty if there is nothing to do."""
    copies: list[PrefixCopy]
    started: list[Sequence]
    """Sequences that got a slot for the first time."""
