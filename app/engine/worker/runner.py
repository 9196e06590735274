"""The batching runner: every step computes the next token of all running answers at once, and pieces of new prompts.

Decides how long a step may be, and what a failure ends.  Who takes part is the scheduler's, the arithmetic the row
model's, the choice of tokens the sampler's.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.worker.checks import check_request, end_ids, failure_reason
from app.engine.worker.forward import RowModel
from app.engine.worker.layout import Piece
from app.engine.worker.loader import LoadedModel
from app.engine.worker.messages import Exchange, Submit, TokenEvent
from app.engine.worker.plan import Plan, Work
from app.engine.worker.plan import Sequence as Answer
from app.engine.worker.sampler import RowSampler, Sampled, sample
from app.engine.worker.scheduler import Scheduler

log = logging.getLogger(__name__)

FAIR_WIDTH = 8
"""Answers that one step may always hold, whoever asked; for so few it takes hardly longer than for one."""


@dataclass(slots=True)
class _Live:
    """What the runner keeps of a request that has not ended."""

    answer: Answer
    request: Submit
    sampler: RowSampler
    ends: frozenset[int]

    @property
    def made(self) -> int:
        return len(self.answer.tokens) - self.answer.prompt_tokens


class BatchingRunner:
    """Continuous batching: requests join and leave between steps."""

    name = "batching"
    unsupported: tuple[str, ...] = ()

    def __init__(
        self,
        loaded: LoadedModel,
        rows: RowModel,
        *,
        reuse: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Args:
        reuse: whether what one request computed may serve another of the same tenant.
        clock: seconds; measures steps.
        """
        self.slots = rows.cache.rows
        self._loaded = loaded
        self._rows = rows
        self._scheduler = Scheduler(self.slots, reuse=reuse)
        self._pace = Pace()
        self._clock = clock
        self._live: dict[int, _Live] = {}
        self._settled: list[TokenEvent] = []

    @property
    def busy(self) -> bool:
        """Whether a request lives, or an event is still to be told."""
        return bool(self._live or self._settled)

    def submit(self, request: Submit) -> None:
        """Take a request; one that the model cannot run gets an error event in the next step."""
        try:
            check_request(request, self._loaded)
            ends = end_ids(request.params, self._loaded)
            device = self._loaded.device
            sampler = RowSampler(request.params, request.prompt_ids, ends, self._rows.vocabulary, device)
        except ValueError as error:
            self._settled.append(TokenEvent(request.id, error=str(error)))
            return
        answer = Answer(request.id, request.tenant, list(request.prompt_ids), len(request.prompt_ids))
        self._live[request.id] = _Live(answer, request, sampler, ends)
        self._scheduler.add(answer)

    def cancel(self, request_id: int) -> None:
        """End a request before the next step."""
        if self._live.pop(request_id, None) is not None:
            self._scheduler.remove(request_id)
            self._settled.append(TokenEvent(request_id, finish="abort"))

    def step(self, exchange: Exchange) -> None:
        """Compute one token for every running answer that is ready for one.

        Raises: torch.AcceleratorError: the device is in an unknown state, and with it this process.
        """
        events, self._settled = self._settled, []
        width = max(FAIR_WIDTH, self.slots // 2)
        plan = self._scheduler.plan(prompt_tokens=self._pace.prompt_tokens(self._any_ready()), width=width)
        events += [TokenEvent(answer.number, cached_tokens=answer.reused) for answer in plan.begun]
        for copy in plan.copies:
            self._rows.cache.copy(copy.source, copy.target, copy.count)
        if plan.work:
            events += self._compute(plan)
        exchange(events)

    def _any_ready(self) -> bool:
        return any(answer.left == 1 for answer in self._scheduler.running)

    def _compute(self, plan: Plan) -> list[TokenEvent]:
        before = self._clock()
        try:
            events = self._advance(plan.work)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            log.exception("a step of %d requests failed", len(plan.work))
            return self._one_by_one(plan.work, error)
        self._pace.see(plan.work, self._clock() - before)
        return events

    def _one_by_one(self, work: Sequence[Work], error: Exception) -> list[TokenEvent]:
        """Find out whose fault a failure was: what fails alone ends with its error, the others go on."""
        if len(work) == 1:
            return [self._fail(work[0].sequence.number, failure_reason(error))]
        return [event for piece in work for event in self._compute(Plan([piece], [], []))]

    def _advance(self, work: Sequence[Work]) -> list[TokenEvent]:
        pieces = [_piece(each) for each in work]
        completing = [each for each in work if each.completes]
        scores = self._rows.scores(pieces, [each.completes for each in work])
        live = [self._live[each.sequence.number] for each in completing]
        drawn = self._draw(scores, live)
        self._scheduler.computed(work)
        return [self._take(each, token) for each, token in zip(live, drawn, strict=True)]

    def _draw(self, scores: Tensor, live: Sequence[_Live]) -> Sequence[Sampled | str]:
        if not live:
            return []
        return [
            drawn if isinstance(drawn, Sampled) else drawn.reason
            for drawn in sample(scores, [each.sampler for each in live])
        ]

    def _take(self, live: _Live, drawn: Sampled | str) -> TokenEvent:
        """Add a token to its answer and tell of it."""
        number = live.request.id
        if isinstance(drawn, str):
            return self._fail(number, drawn)
        live.answer.tokens.append(drawn.token)
        live.sampler.accept(drawn.token)
        logprobs = () if drawn.logprob is None else (drawn.logprob,)
        if drawn.token in live.ends:
            self._end(number)
            return TokenEvent(number, finish="stop", end_token=drawn.token)
        if live.made == live.request.params.max_tokens:
            self._end(number)
            return TokenEvent(number, (drawn.token,), finish="length", logprobs=logprobs)
        return TokenEvent(number, (drawn.token,), logprobs=logprobs)

    def _end(self, number: int) -> None:
        del self._live[number]
        self._scheduler.remove(number)

    def _fail(self, number: int, reason: str) -> TokenEvent:
        """End a request whose numbers cannot be trusted, and leave nothing of them."""
        row = self._live.pop(number).answer.row
        self._scheduler.remove(number, forget=True)
        if row is not None:
            self._rows.cache.clear(row)
        return TokenEvent(number, error=reason)


def _piece(work: Work) -> Piece:
    answer = work.sequence
    assert answer.row is not None  # noqa: S101  # the plan gave it one
    return Piece(answer.row, answer.computed, answer.tokens[answer.computed : answer.computed + work.count])


class Pace:
    """Measures steps, to say how much of a prompt a step can hold before those who stream notice."""

    MOST = 512
    LEAST = 16
    STRETCH = 1.2
    """A step with a piece of prompt in it may take this much longer than without."""
    NEWEST = 0.2
    """Share of the newest step in the running means."""

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        """Of a step that only makes tokens."""
        self._prompt_seconds: float | None = None
        """Of one token of a prompt, added to a step."""

    def prompt_tokens(self, others_wait: bool) -> int:
        """Return how many tokens of prompts the next step may hold.

        Args: others_wait: whether answers are ready for their next token.
        """
        if not others_wait:
            return self.MOST
        if self._decode_seconds is None or self._prompt_seconds is None:
            return 4 * self.LEAST
        fitting = int(self.STRETCH * self._decode_seconds / self._prompt_seconds)
        return min(max(fitting, self.LEAST), self.MOST)

    def see(self, work: Sequence[Work], seconds: float) -> None:
        """Take note of how long a step took."""
        singles = sum(each.count == 1 for each in work)
        tokens = sum(each.count for each in work) - singles
        if not tokens:
            self._decode_seconds = self._mean(self._decode_seconds, seconds)
        elif not singles or self._decode_seconds is not None:
            beside = (self._decode_seconds or 0.0) if singles else 0.0
            self._prompt_seconds = self._mean(self._prompt_seconds, max(seconds - beside, 0.05 * seconds) / tokens)

    def _mean(self, before: float | None, newest: float) -> float:
        return newest if before is None else before + self.NEWEST * (newest - before)
