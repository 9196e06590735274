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

from app.ipc.messages import Exchange, Submit, TokenEvent
from app.worker.execution.model_runner import RowModel
from app.worker.execution.packed_batch import Piece
from app.worker.loading.loader import LoadedModel
from app.worker.sampling.sampler import RowSampler, Sampled, sample
from app.worker.scheduling.schedule import Plan, Work
from app.worker.scheduling.schedule import Sequence as Answer
from app.worker.scheduling.scheduler import Scheduler
from app.worker.validation import check_request, end_ids, failure_reason

log = logging.getLogger(__name__)

FAIR_WIDTH = 4
"""Tokens that one step may always make, whoever asked; for so few it takes not much longer than for one."""


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
        self.compiled = rows.compiled
        self._loaded = loaded
        self._rows = rows
        self._scheduler = Scheduler(self.slots, reuse=reuse)
        self._pace = Pace()
        self._width = FAIR_WIDTH if loaded.device == "cpu" else max(FAIR_WIDTH, self.slots // 2)
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
        plan = self._scheduler.plan(prompt_tokens=self._prompt_tokens(), width=self._width)
        events += [TokenEvent(answer.number, cached_tokens=answer.reused) for answer in plan.begun]
        for copy in plan.copies:
            self._rows.cache.copy(copy.source, copy.target, copy.count)
        if plan.work:
            events += self._compute(plan)
        exchange(events)

    def _prompt_tokens(self) -> int:
        ready = sum(answer.left == 1 for answer in self._scheduler.running)
        if self._scheduler.tenants > 1:
            # The streams of others do not pay for one who sends many requests at once.
            return self._pace.prompt_tokens(min(ready, self._width))
        return self._pace.prompt_tokens(ready, self._scheduler.starting)

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
    """Measures steps, to say how much of a prompt a step can hold before those who stream notice.

    A step takes so long at least, and so much longer for each of its tokens, whether of prompts or of answers: a line
    through the steps so far, by least squares, of which old ones count less and less.
    """

    MOST = 512
    LEAST = 5
    FIRST = 64
    """While nothing is known."""
    STRETCH = 0.8
    """A step with a piece of one prompt in it may take this much longer than without."""
    CROWD = 4
    """As many times more where so many prompts wait, and no more than this."""
    NEWEST = 0.1
    """What the newest step counts."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0.0, 0.0
        """Means over the steps."""
        self._variance, self._covariance = 0.0, 0.0
        self._steps = 0

    def prompt_tokens(self, ready: int, starting: int = 0) -> int:
        """Return how many tokens of prompts the next step may hold.

        Args:
            ready: answers that wait for their next token.
            starting: answers that wait for their first one; the more there are, the more of the step they get.
        """
        if not ready:
            return self.MOST
        if self._covariance <= 0:
            return self.FIRST
        each = self._covariance / self._variance
        without = max(self._seconds + each * (ready - self._tokens), each * ready)
        crowd = min(max(1, starting), self.CROWD)
        return min(max(int(crowd * self.STRETCH * without / each), self.LEAST), self.MOST)

    def see(self, work: Sequence[Work], seconds: float) -> None:
        """Take note of how long a step took."""
        self._steps += 1
        newest = max(self.NEWEST, 1 / self._steps)
        more = sum(each.count for each in work) - self._tokens
        longer = seconds - self._seconds
        self._tokens += newest * more
        self._seconds += newest * longer
        self._variance = (1 - newest) * (self._variance + newest * more * more)
        self._covariance = (1 - newest) * (self._covariance + newest * more * longer)
