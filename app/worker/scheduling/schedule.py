"""The data of one model step: how many tokens of which sequences, and what is copied in the KV cache first."""

from dataclasses import dataclass

from app.types import BACKGROUND_PRIORITY


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
    in_flight: int = 0
    """Tokens behind `token_ids` that are being sampled: the next step may read them on the device."""
    cached_tokens: int = 0
    """Tokens that were in the KV cache already when the sequence first got a slot."""
    started: bool = False
    """Whether it ever had a slot."""
    last_step: int = 0
    """The step that last computed one of its tokens."""
    adapter: str | None = None
    priority: int = 0
    """Lower is served first."""
    scored_tokens: int | None = None
    """Tokens of the prompt, from the first, whose logits have been read for the log-probability of the next one; None
    where no log-probabilities of the prompt are wanted."""

    @property
    def is_background(self) -> bool:
        """Whether it is computed where nothing else is to do."""
        return self.priority >= BACKGROUND_PRIORITY

    @property
    def is_scoring(self) -> bool:
        """Whether logits within the prompt are still to be read; those after its last token are the completion's."""
        return self.scored_tokens is not None and self.scored_tokens < self.prompt_tokens - 1

    @property
    def reusable_tokens(self) -> int:
        """Tokens that need not be computed where they are cached: the logits after all others are read."""
        return self.scored_tokens or 0 if self.is_scoring else len(self.token_ids) - 1

    @property
    def cache_owner(self) -> tuple[str, str | None]:
        """Whose KV cache it may reuse: only that of the same tenant, computed with the same adapter."""
        return self.tenant, self.adapter

    @property
    def uncomputed_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) + self.in_flight - self.computed_tokens

    def append(self, token: int) -> None:
        """Append a sampled token, the oldest in flight if any are."""
        self.token_ids.append(token)
        self.in_flight = max(0, self.in_flight - 1)

    def take_back(self) -> None:
        """Forget the tokens in flight: the last known one is computed again."""
        if self.slot is not None:
            self.computed_tokens -= self.in_flight
        self.in_flight = 0


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """The next `count` tokens of a sequence, to be computed in this step."""

    sequence: Sequence
    count: int
    draft: tuple[int, ...] = ()
    """Guesses of the tokens after them, computed in the same step."""

    @property
    def completes(self) -> bool:
        """Whether the next token can be sampled afterwards."""
        return self.count == self.sequence.uncomputed_tokens

    @property
    def scored(self) -> range:
        """The positions in the prompt whose logits give the log-probability of the next token."""
        sequence, start = self.sequence, self.sequence.computed_tokens
        if not sequence.is_scoring:
            return range(0)
        return range(max(start, sequence.scored_tokens or 0), min(start + self.count, sequence.prompt_tokens - 1))

    @property
    def wanted_logits(self) -> int:
        """After how many of its last tokens the logits are needed."""
        return len(self.scored) + self.completes + len(self.draft)


@dataclass(frozen=True, slots=True)
class ScoringBudget:
    """What prompts whose log-probabilities are wanted may take of a step."""

    max_tokens: int
    """Tokens with logits, of all such prompts together: so many rows of the vocabulary's size fit into memory."""
    token_cost: float = 1.0
    """How many times as long as another prefill token one of them takes, >= 1."""


UNLIMITED_SCORING = ScoringBudget(1 << 62)


@dataclass(frozen=True, slots=True)
class PrefixCopy:
    """A copy of the first `count` tokens' keys and values from one slot to another."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class PrefixSave:
    """A copy of keys and values from a slot, from the token `start` on, to blocks of the prefix cache."""

    slot: int
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefixRestore:
    """A copy of blocks of the prefix cache to the beginning of a slot."""

    blocks: tuple[int, ...]
    slot: int


KVMove = PrefixCopy | PrefixSave | PrefixRestore


@dataclass(frozen=True, slots=True)
class Schedule:
    """The tokens that one model step computes."""

    tokens: list[ScheduledTokens]
    """Decode tokens first, by slot; then prefill chunks.  Empty if there is nothing to do."""
    moves: list[KVMove]
    """Made before the step, in this order."""
    started: list[Sequence]
    """Sequences that got a slot for the first time."""
