"""The serial runner: one request at a time through the pipeline's own `generate`.

Decides how sampling parameters become a generation config.  Works with every decoder-only model that transformers can
generate with.
"""

import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from app.ipc.messages import Exchange, Submit, TokenEvent
from app.types import SamplingParams, TokenLogprob
from app.worker.execution.lora import AdapterSpan, LoraAdapter, LoraLayers
from app.worker.execution.serial.raw_logits import LastLogits, score_prompt
from app.worker.loaded_model import LoadedModel
from app.worker.sampling.grammar import Compilation, Grammars, RowGrammar, apply_grammars
from app.worker.sampling.sampler import NO_TOKEN, NO_TOKEN_LEFT, SamplingFailure
from app.worker.validation import check_request, end_ids, failure_reason

log = logging.getLogger(__name__)

SEED_BITS = 63
MAX_TENANTS = 1000
"""Tenants whose last turn is remembered."""


class NoTokenError(Exception):
    """The scores of a request are not finite; choosing among them would answer with any token at all."""


class _EndedError(Exception):
    """The grammar allows nothing more, and the request has no end token to say so."""


class _RefusedError(Exception):
    """The request's own settings allow no next token; the message is for the client."""


class SerialRunner:
    """One request runs; of the others, the tenant that had its last turn longest ago has the next one."""

    name = "serial"
    slots = 1
    compiled = None
    preemptions = 0
    step_times = ()

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded
        self._adapters: dict[str, LoraAdapter] = {}
        self._lora = LoraLayers(loaded.pipeline.model)
        self._grammars = None if loaded.vocabulary is None else Grammars(loaded.vocabulary, loaded.end_ids)
        self._compilations: dict[int, Compilation] = {}
        """Of the waiting requests that have a grammar."""
        self._waiting: deque[Submit] = deque()
        self._turns: OrderedDict[str, int] = OrderedDict()
        """The number of each tenant's last turn, the oldest first."""
        self._turn_numbers = count()
        self._pending_events: list[TokenEvent] = []
        self._running: Submit | None = None
        self._cancelled = False

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Fields of `SamplingParams` that it cannot honour."""
        always = ("presence_penalty", "frequency_penalty", "logit_bias", "min_tokens")
        return always if self._grammars is not None else (*always, "grammar")

    @property
    def context_length(self) -> int:
        """Tokens that fit a request."""
        return self._model.context_length

    @property
    def busy(self) -> bool:
        """Whether a request waits, or an event has not been sent."""
        return bool(self._waiting or self._pending_events)

    def submit(self, request: Submit) -> None:
        """Take a request; one that the model cannot run gets an error event in the next step."""
        try:
            check_request(request, self._model, self._adapters)
        except ValueError as error:
            self._pending_events.append(TokenEvent(request.id, error=str(error), invalid=True))
        else:
            self._waiting.append(request)
            if request.params.grammar is not None and self._grammars is not None:
                self._compilations[request.id] = self._grammars.compile(request.params.grammar)

    def add_adapter(self, adapter: LoraAdapter) -> None:
        """Let requests use an adapter."""
        self._adapters[adapter.digest] = adapter

    def remove_adapter(self, digest: str) -> None:
        """End what still uses an adapter, and let go of its weights; of a running request, after its token."""
        for request in (*self._waiting, *filter(None, [self._running])):
            if request.adapter == digest:
                self.cancel(request.id)
        if (adapter := self._adapters.pop(digest, None)) is not None:
            self._lora.forget(adapter)

    def cancel(self, request_id: int) -> None:
        """End a request: the running one after its current token, a waiting one at once."""
        if self._running is not None and request_id == self._running.id:
            self._cancelled = True
            return
        for request in self._waiting:
            if request.id == request_id:
                self._waiting.remove(request)
                self._compilations.pop(request_id, None)
                self._pending_events.append(TokenEvent(request_id, finish="abort"))
                return

    def step(self, exchange: Exchange) -> None:
        """Run the next request to its end, calling `exchange` after each token.

        Raises: torch.AcceleratorError: the device is in an unknown state, and with it this process.
        """
        self._send_pending(exchange)
        if not self._waiting:
            return
        request = self._take_next()
        self._running, self._cancelled = request, False
        try:
            exchange([TokenEvent(request.id)])
            exchange([self._generate(request, exchange)])
        finally:
            self._running = None

    def save_ahead(self) -> bool:
        """Return False: it reuses no keys and values."""
        return False

    def _take_next(self) -> Submit:
        """Take the first request of the tenant whose turn it is."""
        request = min(self._waiting, key=lambda each: self._turns.get(each.tenant, -1))
        self._waiting.remove(request)
        self._turns[request.tenant] = next(self._turn_numbers)
        self._turns.move_to_end(request.tenant)
        if len(self._turns) > MAX_TENANTS:
            self._turns.popitem(last=False)
        return request

    def _send_pending(self, exchange: Exchange) -> None:
        while self._pending_events:
            events, self._pending_events = self._pending_events, []
            exchange(events)

    def _generate(self, request: Submit, exchange: Exchange) -> TokenEvent:
        """Run one request, sending all but its last event, which is returned."""
        ends = end_ids(request.params, self._model)
        try:
            grammar = self._grammar(request, ends)
            reporter = _TokenReporter(request, ends, exchange, lambda: self._cancelled, grammar)
            torch.manual_seed(_seed(request.params))
            with self._lora.applied(self._spans(request)):
                if request.params.prompt_logprobs is not None:
                    self._score(request, exchange)
                if not self._cancelled and not request.params.max_tokens:
                    return TokenEvent(request.id, finish="length")
                if not self._cancelled:
                    reads = request.params.logprobs is not None
                    with reporter.logits.of(self._model.pipeline.model) if reads else nullcontext():
                        self._forward(request, reporter, grammar)
        except torch.AcceleratorError:
            raise
        except NoTokenError:
            return TokenEvent(request.id, error=NO_TOKEN.reason)
        except _EndedError:
            return TokenEvent(request.id, finish="stop")
        except _RefusedError as error:
            return TokenEvent(request.id, error=str(error), invalid=True)
        except Exception as error:
            log.exception("a request failed")
            return TokenEvent(request.id, error=failure_reason(error))
        return reporter.last_event()

    def _spans(self, request: Submit) -> list[AdapterSpan]:
        """Return the adapter of all the request's tokens, if it has one."""
        return [] if request.adapter is None else [AdapterSpan(0, 0, self._adapters[request.adapter])]

    def _score(self, request: Submit, exchange: Exchange) -> None:
        """Send the log-probabilities of the prompt, until it is cancelled.

        Raises: NoTokenError: they are not finite.
        """
        model, alternatives = self._model.pipeline.model, request.params.prompt_logprobs or 0
        for scored in score_prompt(model, request.prompt_ids, alternatives, self._model.device):
            exchange([TokenEvent(request.id, prompt_logprobs=tuple(_finite(scored)))])
            if self._cancelled:
                return

    def _grammar(self, request: Submit, ends: frozenset[int]) -> RowGrammar | None:
        """Raises: _RefusedError: the grammar cannot be enforced."""
        compilation = self._compilations.pop(request.id, None)
        if compilation is None or self._grammars is None:
            return None
        try:
            return self._grammars.row(compilation, ends)
        except ValueError as error:
            raise _RefusedError(f"The grammar {error}.") from None

    def _forward(self, request: Submit, reporter: "_TokenReporter", grammar: RowGrammar | None) -> None:
        input_ids = torch.tensor([request.prompt_ids], dtype=torch.long)
        # Also what `TextGenerationPipeline.preprocess` hands on, without the text, which never comes here.
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "prompt_text": ""}
        processors: list[LogitsProcessor] = [_FiniteScores()]
        if grammar is not None and self._grammars is not None:
            processors.append(_GrammarMask(grammar, self._grammars))
        self._model.pipeline.forward(  # type: ignore[no-untyped-call]
            inputs,
            generation_config=generation_config(request.params, self._model),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([reporter]),
        )


def _finite(scored: list[TokenLogprob] | SamplingFailure) -> list[TokenLogprob]:
    """Raises: NoTokenError: the scores are not finite."""
    if isinstance(scored, SamplingFailure):
        raise NoTokenError
    return scored


def _seed(params: SamplingParams) -> int:
    if params.seed is None:
        return secrets.randbits(SEED_BITS)
    return (params.seed + params.sample) % (1 << SEED_BITS)


def generation_config(params: SamplingParams, model: LoadedModel) -> GenerationConfig:
    """Set every sampling parameter, so that neither the model's nor the pipeline's defaults apply."""
    settings: dict[str, Any] = {
        "max_new_tokens": params.max_tokens,
        "do_sample": params.temperature > 0,
        "num_beams": 1,
        "repetition_penalty": params.repetition_penalty,
        "eos_token_id": list(end_ids(params, model)) or None,
        "pad_token_id": model.pad_id,
        "use_cache": True,
        "suppress_tokens": list(model.rules.suppress_tokens) or None,
        "begin_suppress_tokens": list(model.rules.begin_suppress_tokens) or None,
        "bad_words_ids": [list(each) for each in model.rules.bad_words_ids] or None,
        "sequence_bias": [[list(ids), bias] for ids, bias in model.rules.sequence_bias] or None,
        "no_repeat_ngram_size": model.rules.no_repeat_ngram_size or None,
    }
    if params.temperature > 0:
        settings |= {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        settings |= {"min_p": params.min_p or None}
    return GenerationConfig(**settings)  # type: ignore[no-untyped-call]


class _FiniteScores(LogitsProcessor):
    """Refuses scores among which no token can be chosen; `generate` itself takes the first token for the likeliest."""

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        """Take (1, vocab) scores and return them.  Raises: NoTokenError: the highest is not finite."""
        if not scores.amax(dim=-1).isfinite().all():
            raise NoTokenError
        return scores


class _GrammarMask(LogitsProcessor):
    """Leaves only those tokens that the request's grammar allows next."""

    def __init__(self, grammar: RowGrammar, grammars: Grammars) -> None:
        self._grammar = grammar
        self._grammars = grammars

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        """Take (1, vocab) scores and return others.

        Raises: _EndedError, _RefusedError: there is no next token.
        """
        self._grammars.compute_mask(self._grammar)
        if self._grammar.failure is not None:
            raise _RefusedError(self._grammar.failure)
        if self._grammar.is_over:
            raise _EndedError
        allowed = scores.clone()
        apply_grammars(allowed, [self._grammar])
        if not allowed.amax(dim=-1).isfinite().all():
            raise _RefusedError(NO_TOKEN_LEFT.reason)
        return allowed


class _TokenReporter(StoppingCriteria):
    """Sends an event for each token that `generate` samples, and stops it once the request is cancelled.

    Not a streamer: `generate` evaluates its stopping criteria before it calls the streamer, so that a cancel which the
    streamer reads would cost one more token.
    """

    def __init__(
        self,
        request: Submit,
        end_ids: frozenset[int],
        exchange: Exchange,
        cancelled: Callable[[], bool],
        grammar: RowGrammar | None,
    ) -> None:
        self._request = request
        self._grammar = grammar
        self._end_ids = end_ids
        self._exchange = exchange
        self._cancelled = cancelled
        self.logits = LastLogits()
        self._completion_tokens = 0
        self._last: TokenEvent | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Take (1, length) token ids, of which the last is new, and return (1,) whether to stop."""
        if self._last is None:
            self._report(int(input_ids[0, -1]))
        stop = self._last is not None or self._cancelled()
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)

    def last_event(self) -> TokenEvent:
        """Return the event that ends the request; without an end token or the full length it was cancelled."""
        return self._last or TokenEvent(self._request.id, finish="abort")

    def _report(self, token: int) -> None:
        self._completion_tokens += 1
        request_id, logprobs = self._request.id, self._logprobs(token)
        if token in self._end_ids:
            scored = self._request.params.prompt_logprobs is not None
            self._last = TokenEvent(request_id, finish="stop", end_token=token, logprobs=logprobs if scored else ())
        elif self._is_over_after(token):
            self._last = TokenEvent(request_id, (token,), finish="stop", logprobs=logprobs)
        elif self._completion_tokens == self._request.params.max_tokens:
            self._last = TokenEvent(request_id, (token,), finish="length", logprobs=logprobs)
        else:
            self._exchange([TokenEvent(request_id, (token,), logprobs=logprobs)])

    def _logprobs(self, token: int) -> tuple[TokenLogprob, ...]:
        """Return the log-probability of the token that was chosen last, without a rank, if the request wants it."""
        alternatives = self._request.params.logprobs
        if alternatives is None:
            return ()
        return tuple(replace(each, rank=0) for each in _finite(self.logits.score(token, alternatives)))

    def _is_over_after(self, token: int) -> bool:
        """Move on in the grammar, and return whether it allows nothing more."""
        if self._grammar is None:
            return False
        self._grammar.accept(token)
        return self._grammar.is_over
