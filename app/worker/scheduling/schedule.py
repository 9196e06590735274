"""The words of a step: which sequences take part, with how many tokens, and what is copied first."""

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: its prompt and what the model has added to it."""

    number: int
    tenant: str
    tokens: list[int]
    """Prompt and answer so far."""
    prompt_tokens: int
    row: int | None = None
    """Where its keys and values are; None while it waits."""
    computed: int = 0
    """How many of `tokens`, from the first, have keys and values in the row."""
    reused: int = 0
    """Of these, how many were there when it first got a row."""
    begun: bool = False
    """Whether it ever had a row."""
    served: int = 0
    """The step that last computed something of it."""

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the next `count` tokens of a sequence."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether the next token can be drawn afterwards."""
        return self.count == self.sequence.left


@dataclass(frozen=True, slots=True)
class Copy:
    """Before anything else, copy the keys and values of the first `count` tokens from one row to another."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step."""

    work: list[Work]
    """Single tokens first, by row; then pieces of prompts.  Empty if there is nothing to do."""
    copies: list[Copy]
    begun: list[Sequence]
    """Sequences that got a row for the first time."""
