"""The continuous-batching runner: each step decodes a token of each running request and prefills new prompts.

Decides how many prefill tokens a step may hold, and which requests a failure ends.  The scheduler chooses the
sequences, the model runner computes logits, the sampler chooses tokens.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from app.ipc.messages import Exchange, Submit, TokenEvent
from app.worker.execution.lora import LoraAdapter
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import Segment
from app.worker.loaded_model import LoadedModel
from app.worker.sampling.device_sampler import DeviceSampler
from app.worker.sampling.grammar import Grammars
from app.worker.sampling.prompt_scoring import max_scored_tokens
from app.worker.sampling.sampler import SamplingFailure, SequenceSampler
from app.worker.scheduling import schedule
from app.worker.scheduling.drafting import with_drafts
from app.worker.scheduling.grammar_requests import GrammarRequests
from app.worker.scheduling.in_flight import InFlight, launch, launch_next, launchable
from app.worker.scheduling.live_request import LiveRequest
from app.worker.scheduling.live_requests import LiveRequests, sample_rows
from app.worker.scheduling.prefix_tree import BLOCK_TOKENS
from app.worker.scheduling.schedule import (
    KVMove,
    PrefixCopy,
    PrefixRestore,
    PrefixSave,
    Schedule,
    ScheduledTokens,
    ScoringBudget,
)
from app.worker.scheduling.scheduler import Scheduler
from app.worker.scheduling.speculation import NgramDrafter
from app.worker.scheduling.step_time import GpuStepTime, PrefillBudget, StepTimeModel
from app.worker.validation import check_request, end_ids, failure_reason, is_out_of_memory

log = logging.getLogger(__name__)

MIN_DECODE_WIDTH = 3
"""Decode tokens that a step may hold however many tenants there are; so few take little longer than one."""
MIN_MEMORY_CHUNK = 16
"""Tokens of a prompt that there must be memory for; more are computed in halves."""
AHEAD_BYTES = 2 * 1024**2
"""Keys and values that are copied at once while there is nothing else to do: in about a millisecond, which is what a
request that comes meanwhile waits."""


class BatchingRunner:
    """Continuous batching: requests join and leave between steps."""

    name = "batching"

    def __init__(
        self,
        loaded: LoadedModel,
        model_runner: ModelRunner,
        *,
        prefix_reuse: bool = True,
        prefix_cache_bytes: int = 0,
        speculation: bool = False,
        asynchronous: bool | None = None,
        device_sampler: DeviceSampler | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Args:
        prefix_reuse: whether the KV cache of one request may serve another of the same tenant.
        prefix_cache_bytes: memory for what slots would lose that are needed again.
        speculation: whether next tokens are guessed from a sequence's own text.
        asynchronous: whether a step is launched before the tokens of the last one are read; None: on a GPU.
        device_sampler: what samples then, with what it has recorded; None: a new one.
        clock: seconds; measures steps.
        """
        self.slots = model_runner.cache.slots
        self.compiled = model_runner.compiled
        self.step_times = model_runner.step_times
        self._loaded = loaded
        self._model_runner = model_runner
        blocks = model_runner.cache.add_prefix_cache(prefix_cache_bytes if prefix_reuse else 0, BLOCK_TOKENS)
        self._scheduler = Scheduler(self.slots, prefix_reuse=prefix_reuse, prefix_blocks=blocks)
        self._blocks_ahead = max(1, AHEAD_BYTES // max(1, model_runner.cache.bytes_per_token * BLOCK_TOKENS))
        self._step_time: PrefillBudget = GpuStepTime() if loaded.device == "cuda" else StepTimeModel()
        self._max_scored = max_scored_tokens(model_runner.vocab_size, loaded.device)
        self._decode_width = MIN_DECODE_WIDTH if loaded.device == "cpu" else max(MIN_DECODE_WIDTH, self.slots // 2)
        self._speculation = speculation
        self._clock = clock
        self._live = LiveRequests(self._scheduler, model_runner.cache)
        self._adapters: dict[str, LoraAdapter] = {}
        self._grammars: GrammarRequests | None = None
        """The scheduler does not know requests that wait for their grammar."""
        if loaded.vocabulary is not None:
            self._grammars = GrammarRequests(Grammars(loaded.vocabulary, loaded.end_ids))
        self._pending_events: list[TokenEvent] = []
        self._device_sampler: DeviceSampler | None = None
        # Guesses are of tokens that the host has to know.
        if not speculation and (loaded.device == "cuda" if asynchronous is None else asynchronous):
            self._device_sampler = device_sampler or DeviceSampler(self.slots, model_runner.vocab_size, loaded.device)

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Fields of `SamplingParams` that it cannot honour."""
        return () if self._grammars is not None else ("grammar",)

    @property
    def context_length(self) -> int:
        """Tokens that fit a request."""
        return self._loaded.context_length

    @property
    def busy(self) -> bool:
        """Whether a request is live, or an event has not been sent."""
        return bool(self._live or self._pending_events)

    @property
    def preemptions(self) -> int:
        """How often a request has lost its row of the KV cache so far, to go on later."""
        return self._scheduler.preemptions

    def submit(self, request: Submit) -> None:
        """Take a request; one that the model cannot run gets an error event in the next step."""
        try:
            check_request(request, self._loaded, self._adapters)
            ends = end_ids(request.params, self._loaded)
            sampler = SequenceSampler(
                request.params,
                request.prompt_ids,
                ends,
                self._model_runner.vocab_size,
                self._loaded.device,
                self._loaded.rules,
            )
        except ValueError as error:
            self._pending_events.append(TokenEvent(request.id, error=str(error), invalid=True))
            return
        sequence = schedule.Sequence(
            request.id,
            request.tenant,
            list(request.prompt_ids),
            len(request.prompt_ids),
            adapter=request.adapter,
            priority=request.priority,
            scored_tokens=None if request.params.prompt_logprobs is None else 0,
        )
        # A grammar's mask is known for one token at a time.
        drafter = NgramDrafter() if self._speculation and request.params.grammar is None else None
        self._live[request.id] = LiveRequest(sequence, request, sampler, ends, drafter)
        if request.params.grammar is not None and self._grammars is not None:
            self._grammars.compile(request.id, request.params.grammar, ends)
        else:
            self._scheduler.add(sequence)

    def add_adapter(self, adapter: LoraAdapter) -> None:
        """Let requests use an adapter."""
        self._adapters[adapter.digest] = adapter

    def remove_adapter(self, digest: str) -> None:
        """End what still uses an adapter, and let go of its weights."""
        for request_id, live in tuple(self._live.items()):
            if live.request.adapter == digest:
                self.cancel(request_id)
        if (adapter := self._adapters.pop(digest, None)) is not None:
            self._model_runner.executor.forget_adapter(adapter)

    def cancel(self, request_id: int) -> None:
        """End a request before the next step."""
        if request_id in self._live:
            self._live.end(request_id)
            if self._grammars is not None:
                self._grammars.forget(request_id)
            self._pending_events.append(TokenEvent(request_id, finish="abort"))

    def step(self, exchange: Exchange) -> None:
        """Compute one step and send its events.

        Raises: torch.AcceleratorError: the device is in an unknown state, and with it this process.
        """
        if self._grammars:
            self._take_compiled(self._grammars)
        events, self._pending_events = self._pending_events, []
        prefill_tokens, background_tokens = self._budgets()
        planned = self._scheduler.schedule(
            prefill_tokens=prefill_tokens,
            decode_width=self._decode_width,
            scoring=ScoringBudget(self._max_scored, self._step_time.scored_token_cost),
            background_tokens=background_tokens,
        )
        events += [TokenEvent(each.request_id, cached_tokens=each.cached_tokens) for each in planned.started]
        for move in planned.moves:
            self._move(move)
        if self._speculation:
            planned = with_drafts(planned, self._live, self._model_runner.cache.length)
        events += self._advance(planned)
        exchange(events)

    def save_ahead(self) -> bool:
        """Copy a piece of what the next requests will overwrite to the prefix cache, while none is live.

        Returns: whether there was one.
        """
        move = None if self.busy else self._scheduler.save_ahead(self._blocks_ahead)
        if move is None:
            return False
        self._move(move)
        return True

    def _move(self, move: KVMove) -> None:
        cache = self._model_runner.cache
        match move:
            case PrefixCopy(source, target, count):
                cache.copy_prefix(source, target, count)
            case PrefixSave(slot, start, blocks):
                cache.save_prefix(slot, start, blocks)
            case PrefixRestore(blocks, slot):
                cache.restore_prefix(blocks, slot)

    def _take_compiled(self, grammars: GrammarRequests) -> None:
        """Hand the requests whose grammar is compiled to the scheduler."""
        for request_id, grammar in grammars.take_compiled(idle=len(self._live) == len(grammars)):
            live = self._live[request_id]
            if isinstance(grammar, str):
                self._live.end(request_id)
                self._pending_events.append(TokenEvent(request_id, error=grammar, invalid=True))
            else:
                live.sampler.grammar = grammar
                self._scheduler.add(live.sequence)

    def _budgets(self) -> tuple[int, int]:
        """Return how many tokens of prompts a step may hold, and how many of the background beside others."""
        decodes = self._scheduler.decoding
        shared = self._step_time.prefill_token_budget(min(decodes, self._decode_width))
        if self._scheduler.tenants > 1:
            # One tenant's many prompts must not slow down the streams of the others.
            return shared, shared
        return self._step_time.prefill_token_budget(decodes, self._scheduler.pending_prefills), shared

    def _advance(self, planned: Schedule) -> list[TokenEvent]:
        """Compute a step and return its events, or launch it and return those of the one before."""
        sampler, in_flight = self._device_sampler, self._live.in_flight
        if sampler is None:
            return self._compute(planned.tokens)
        continues = in_flight is not None and in_flight.is_continued_by(planned.tokens)
        tokens = planned.tokens if continues else launchable(planned.tokens, self._live)
        if tokens is None:
            events = self._land()
            return events + self._compute(self._still_live(planned.tokens) if events else planned.tokens)
        if not tokens:
            return self._land()
        try:
            launched = self._launch(sampler, tokens, in_flight if continues else None)
        except Exception as error:  # noqa: BLE001  # `_recover` raises what cannot be recovered from
            events = self._land()
            return events + self._recover(self._still_live(tokens), error)
        self._scheduler.mark_computed(tokens)
        return self._land(launched)

    def _launch(self, sampler: DeviceSampler, tokens: Sequence[ScheduledTokens], last: InFlight | None) -> InFlight:
        """Start a step.  Args: last: the one before, if this one is the next token of each of its sequences."""
        began = self._clock()
        if last is not None and (launched := launch_next(self._model_runner, sampler, last, now=began)) is not None:
            return launched
        segments = [self._segment(each) for each in tokens]
        return launch(self._model_runner, sampler, tokens, segments, self._live, now=began)

    def _still_live(self, tokens: Sequence[ScheduledTokens]) -> list[ScheduledTokens]:
        return [each for each in tokens if each.sequence.request_id in self._live]

    def _land(self, launched: InFlight | None = None) -> list[TokenEvent]:
        """Wait for the step in flight and append its tokens; another one may have been launched behind it."""
        landing, self._live.in_flight = self._live.in_flight, launched
        if landing is None:
            return []
        results, events = landing.sampled.read(), list[TokenEvent]()
        # What was launched behind it begins now.
        ended = self._clock()
        self._step_time.observe(landing.tokens, ended - landing.began, prefill=landing.prefill)
        if launched is not None:
            launched.began = ended
        for request_id, row in landing.rows.items():
            if (result := results[row]) is not None:
                events.append(self._live.append(self._live[request_id], result))
                continue
            self._live[request_id].sequence.take_back()
            if launched is not None:
                launched.rows.pop(request_id, None)
        return events

    def _compute(self, tokens: Sequence[ScheduledTokens]) -> list[TokenEvent]:
        """Compute a step to its end and return its events."""
        if not tokens:
            return []
        began, count = self._clock(), sum(each.count + len(each.draft) for each in tokens)
        prefill = sum(each.count for each in tokens if each.count > 1)
        scored = sum(len(each.scored) for each in tokens)
        try:
            events = self._forward_and_sample(tokens)
        except Exception as error:  # noqa: BLE001  # `_recover` raises what cannot be recovered from
            return self._recover(tokens, error)
        self._step_time.observe(count, self._clock() - began, prefill=prefill, scored=scored)
        return events

    def _recover(self, tokens: Sequence[ScheduledTokens], error: Exception) -> list[TokenEvent]:
        """Compute in parts what failed in one step; to be called while the error is handled.

        Raises: torch.AcceleratorError: the device is in an unknown state.
        """
        no_memory = is_out_of_memory(error)
        if isinstance(error, torch.AcceleratorError) and not no_memory:
            raise error
        if no_memory:
            count = sum(each.count + len(each.draft) for each in tokens)
            log.warning("there is no memory for a step of %d requests and %d tokens", len(tokens), count)
        else:
            log.exception("a step of %d requests failed", len(tokens))
        return self._isolate_failure(tokens, error) if tokens else []

    def _isolate_failure(self, tokens: Sequence[ScheduledTokens], error: Exception) -> list[TokenEvent]:
        """Compute the halves of a failed step by themselves: a sequence that fails alone ends with its error.

        A prompt that there is no memory for is computed in smaller pieces.
        """
        no_memory = is_out_of_memory(error)
        if no_memory:
            self._model_runner.cache.release_memory()
        if len(tokens) > 1:
            middle = len(tokens) // 2
            parts = [tokens[:middle], tokens[middle:]]
        elif no_memory and tokens[0].count > MIN_MEMORY_CHUNK:
            parts = [[replace(tokens[0], count=tokens[0].count // 2, draft=())]]
        else:
            return [self._live.fail(tokens[0].sequence.request_id, SamplingFailure(failure_reason(error)))]
        return [event for part in parts for event in self._compute(part)]

    def _forward_and_sample(self, tokens: Sequence[ScheduledTokens]) -> list[TokenEvent]:
        wanted = [each.wanted_logits for each in tokens]
        live = [self._live[each.sequence.request_id] for each in tokens if each.completes]
        constrained = {each.request.id: each.sampler.grammar for each in live if each.sampler.grammar is not None}
        if constrained and self._grammars is not None:
            self._grammars.begin_masks(constrained.values())
        logits = self._model_runner.forward([self._segment(each) for each in tokens], wanted)
        ends = list(accumulate(wanted))
        rows = [end - 1 - len(each.draft) for each, end in zip(tokens, ends, strict=True) if each.completes]
        late: Collection[int] = ()
        if constrained and self._grammars is not None:
            late = self._grammars.late(constrained, others=len(constrained) < len(live))
        rows = [row for row, each in zip(rows, live, strict=True) if each.request.id not in late]
        live = [each for each in live if each.request.id not in late]
        sampled = sample_rows(logits, rows, live)
        scored = {
            each.sequence.request_id: self._live.score(each, logits[end - count :])
            for each, end, count in zip(tokens, ends, wanted, strict=True)
            if each.scored
        }
        if late:
            # Their last tokens are computed once more when their masks are known.
            tokens = [replace(each, count=each.count - (each.sequence.request_id in late)) for each in tokens]
        self._scheduler.mark_computed(tokens)
        events = [self._live.append_scores(request_id, found) for request_id, found in scored.items()]
        events += [
            self._live.append(each, token)
            for each, token in zip(live, sampled, strict=True)
            if each.request.id in self._live
        ]
        drafts = {each.sequence.request_id: each.draft for each in tokens if each.draft}
        return events + self._accept_drafts(logits, rows, live, drafts) if drafts else events

    def _accept_drafts(
        self, logits: Tensor, rows: Sequence[int], live: Sequence[LiveRequest], drafts: Mapping[int, tuple[int, ...]]
    ) -> list[TokenEvent]:
        """Sample behind the guessed tokens for as long as each is the one that was sampled.

        Args: rows: of the logits that the tokens before the guesses were sampled from, one for each of `live`.
        """
        events: list[TokenEvent] = []
        agreeing = [(each, row) for each, row in zip(live, rows, strict=True) if each.request.id in drafts]
        drafted, accepted = [each for each, _ in agreeing], 0
        right = dict.fromkeys(drafts, 0)
        while agreeing := [
            (each, row)
            for each, row in agreeing
            if each.request.id in self._live
            and accepted < len(drafts[each.request.id])
            and each.sequence.token_ids[-1] == drafts[each.request.id][accepted]
        ]:
            accepted += 1
            self._scheduler.mark_computed([ScheduledTokens(each.sequence, 1) for each, _ in agreeing])
            sampled = sample_rows(logits, [row + accepted for _, row in agreeing], [each for each, _ in agreeing])
            events += [self._live.append(each, token) for (each, _), token in zip(agreeing, sampled, strict=True)]
            right |= {each.request.id: accepted for each, _ in agreeing}
        for each in drafted:
            if each.drafter is not None:
                number = each.request.id
                length = len(each.sequence.token_ids)
                each.drafter.learn(proposed=len(drafts[number]), accepted=right[number], length=length)
        return events

    def _segment(self, scheduled: ScheduledTokens) -> Segment:
        sequence = scheduled.sequence
        assert sequence.slot is not None  # noqa: S101  # the schedule gave it one
        start = sequence.computed_tokens
        adapter = None if sequence.adapter is None else self._adapters[sequence.adapter]
        if sequence.in_flight and self._live.in_flight is not None:
            return Segment(sequence.slot, start, (0,), adapter, self._live.in_flight.token_of(sequence.request_id))
        token_ids = [*sequence.token_ids[start : start + scheduled.count], *scheduled.draft]
        return Segment(sequence.slot, start, token_ids, adapter)
