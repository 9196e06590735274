"""The requests that have not ended: what is appended to them, and how they end."""

from collections.abc import Sequence

from torch import Tensor

from app.ipc.messages import TokenEvent
from app.types import TokenLogprob
from app.worker.execution.kv_cache import KVCache
from app.worker.sampling.prompt_scoring import score_tokens
from app.worker.sampling.sampler import Sampled, SamplingFailure, sample
from app.worker.sampling.sampling_ops import gather_rows
from app.worker.scheduling.in_flight import InFlight
from app.worker.scheduling.live_request import Ended, LiveRequest, known_outcome
from app.worker.scheduling.schedule import ScheduledTokens
from app.worker.scheduling.scheduler import Scheduler


class LiveRequests(dict[int, LiveRequest]):
    """By their numbers; what ends is gone from the scheduler and the step in flight, too."""

    def __init__(self, scheduler: Scheduler, cache: KVCache) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._cache = cache
        self.in_flight: InFlight | None = None
        """The step whose tokens have not been read."""

    def score(self, scheduled: ScheduledTokens, logits: Tensor) -> list[TokenLogprob] | SamplingFailure:
        """Return the log-probabilities of the prompt that a step gives.

        Args: logits: of the chunk's wanted tokens, and maybe of others behind them.
        """
        sequence, positions = scheduled.sequence, scheduled.scored
        following = sequence.token_ids[positions.start + 1 : positions.stop + 1]
        alternatives = self[sequence.request_id].request.params.prompt_logprobs or 0
        return score_tokens(logits[: len(following)], following, alternatives)

    def append_scores(self, request_id: int, scored: list[TokenLogprob] | SamplingFailure) -> TokenEvent:
        """Record how much of the prompt has been scored and return the event that reports it."""
        if isinstance(scored, SamplingFailure):
            return self.fail(request_id, scored)
        sequence = self[request_id].sequence
        sequence.scored_tokens = (sequence.scored_tokens or 0) + len(scored)
        return TokenEvent(request_id, prompt_logprobs=tuple(scored))

    def append(self, live: LiveRequest, sampled: Sampled | SamplingFailure | Ended | None) -> TokenEvent:
        """Append a token to its sequence and return the event that reports it."""
        request_id = live.request.id
        if sampled is None:
            self.end(request_id)
            return TokenEvent(request_id, finish="length")
        if isinstance(sampled, SamplingFailure):
            return self.fail(request_id, sampled)
        if isinstance(sampled, Ended):
            self.end(request_id)
            return TokenEvent(request_id, finish="stop")
        ends = sampled.token in live.end_ids
        live.sequence.append(sampled.token)
        live.sampler.accept(sampled.token, ends=ends)
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        if ends:
            self.end(request_id)
            scored = live.request.params.prompt_logprobs is not None
            return TokenEvent(request_id, finish="stop", end_token=sampled.token, logprobs=logprobs if scored else ())
        if live.sampler.grammar is not None and live.sampler.grammar.is_over:
            self.end(request_id)
            return TokenEvent(request_id, (sampled.token,), finish="stop", logprobs=logprobs)
        if live.completion_tokens == live.request.params.max_tokens:
            self.end(request_id)
            return TokenEvent(request_id, (sampled.token,), finish="length", logprobs=logprobs)
        return TokenEvent(request_id, (sampled.token,), logprobs=logprobs)

    def end(self, request_id: int, *, discard: bool = False) -> None:
        """Forget a request.  Args: discard: whether what it computed must not be reused."""
        del self[request_id]
        self._scheduler.remove(request_id, discard=discard)
        if self.in_flight is not None:
            self.in_flight.rows.pop(request_id, None)
        if not self:
            # Nobody waits for it.
            self.in_flight = None

    def fail(self, request_id: int, failure: SamplingFailure) -> TokenEvent:
        """End a request whose numbers cannot be trusted, and clear them from the KV cache."""
        slot = self[request_id].sequence.slot
        self.end(request_id, discard=True)
        if slot is not None:
            self._cache.clear_slot(slot)
        return TokenEvent(request_id, error=failure.reason, invalid=failure.invalid)


def sample_rows(
    logits: Tensor, rows: Sequence[int], live: Sequence[LiveRequest]
) -> Sequence[Sampled | SamplingFailure | Ended | None]:
    """Sample the next token of each request that completes its prompt; None for one that wants no token.

    Args: rows: of `logits`, one for each of `live`.
    """
    results: list[Sampled | SamplingFailure | Ended | None] = [known_outcome(each.sampler.grammar) for each in live]
    wanting = [index for index, each in enumerate(live) if each.request.params.max_tokens and results[index] is None]
    if wanting:
        chosen = gather_rows(logits, [rows[index] for index in wanting])
        for index, found in zip(wanting, sample(chosen, [live[index].sampler for index in wanting]), strict=True):
            results[index] = found
    return results
