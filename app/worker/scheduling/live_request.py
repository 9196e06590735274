"""A request that has not ended, and what may become of its next token."""

from dataclasses import dataclass

from app.ipc.messages import Submit
from app.worker.sampling.grammar import RowGrammar
from app.worker.sampling.sampler import SamplingFailure, SequenceSampler
from app.worker.scheduling import schedule
from app.worker.scheduling.speculation import NgramDrafter


@dataclass(frozen=True, slots=True)
class Ended:
    """The grammar of a completion allows nothing more, and the model has no end token to say so."""


@dataclass(slots=True)
class LiveRequest:
    """A request that has not ended."""

    sequence: schedule.Sequence
    request: Submit
    sampler: SequenceSampler
    end_ids: frozenset[int]
    drafter: NgramDrafter | None = None
    """Guesses its next tokens, where that is asked for."""

    @property
    def completion_tokens(self) -> int:
        """Tokens that were sampled and read."""
        return len(self.sequence.token_ids) - self.sequence.prompt_tokens

    @property
    def tokens_left(self) -> int:
        """Tokens that it may still have, without those in flight."""
        return self.request.params.max_tokens - self.completion_tokens - self.sequence.in_flight


def known_outcome(grammar: RowGrammar | None) -> SamplingFailure | Ended | None:
    """Return what becomes of a completion whatever the model says; None where a token has to be sampled."""
    if grammar is None:
        return None
    if grammar.failure is not None:
        return SamplingFailure(grammar.failure, invalid=True)
    return Ended() if grammar.is_over else None
