"""Sampling: turn the logits of one model step into next tokens, each row of the batch with its own parameters.

Decides how sampling parameters change logits, and what is reported of log-probabilities.  The runner owns one
`SequenceSampler` for each request, calls `sample` after each forward pass, and `accept` for each token it appends; when
a completion ends is the runner's decision.
"""

import hashlib
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.types import SamplingParams, TokenLogprob
from app.worker.sampling.generation_rules import NO_RULES, GenerationRules, RuleState
from app.worker.sampling.grammar import RowGrammar, apply_grammars
from app.worker.sampling.penalties import (
    NO_TOKENS,
    TokenCounts,
    apply_logit_bias,
    apply_presence_and_frequency,
    apply_repetition_penalty,
    mask_tokens,
)
from app.worker.sampling.sampling_ops import (
    NEEDS_WIDER_TOPK,
    NO_VALID_TOKEN,
    RULED_OUT,
    DrawColumns,
    RowSet,
    SamplingDraw,
    argmax_tokens,
    gather_rows,
    name_failures,
    sample_sorted,
    sample_unsorted,
    uniform_number,
)

TOPK_WIDTHS = (256, 4096)
"""How many of a row's most likely tokens are sorted: the first width that holds all it may take, else all."""
REPORTED_TOKENS = 32
"""Most likely tokens fetched for a report: the 20 that can be asked for, and spare ones for equals of the last."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of one row."""

    token: int
    logprob: TokenLogprob | None = None
    """Only where the request asked for it.  Tokens that the model rules out (-inf) are not among its `top`."""


@dataclass(frozen=True, slots=True)
class SamplingFailure:
    """No token can be sampled from this row's logits, so its request fails."""

    reason: str
    invalid: bool = False
    """Whether the request is at fault, not the model."""


NO_TOKEN = SamplingFailure("No token can be chosen: the model's scores are not finite for this prompt.")
NO_TOKEN_LEFT = SamplingFailure("No token can be chosen: the request's settings rule out all of them.", invalid=True)


class SequenceSampler:
    """The sampling state of one request, from token to token."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
        rules: GenerationRules = NO_RULES,
        grammar: RowGrammar | None = None,
    ) -> None:
        """Args:
            end_ids: the end tokens that `min_tokens` masks, beside `stop_token_ids`.
            vocab_size: width of the model's logits.
            device: where the logits will be; elsewhere it works too, but slower.
            rules: the model's own, which every request follows.
            grammar: what the completion must follow; its mask must be known whenever a token is sampled.
        Raises: ValueError: a token id lies outside the vocabulary.
        """
        bias: dict[int, float] = {}
        for token, value in params.logit_bias:
            bias[token] = bias.get(token, 0.0) + value
        seen = set(prompt_ids) if params.repetition_penalty != 1 else set()
        _check_vocabulary("logit_bias", bias, vocab_size)
        _check_vocabulary("stop_token_ids", params.stop_token_ids, vocab_size)
        _check_vocabulary("The prompt", seen, vocab_size)
        # A model may name an end token that it has no logit for.
        ends = {*params.stop_token_ids, *(token for token in end_ids if 0 <= token < vocab_size)}
        sampling_device = _sampling_device(torch.device(device))

        self.params = params
        self.grammar = grammar
        self.vocab_size = vocab_size
        self.top_k = params.top_k if params.top_k < vocab_size else 0
        self.has_count_penalty = params.presence_penalty != 0 or params.frequency_penalty != 0
        self.has_repetition_penalty = params.repetition_penalty != 1
        self.counts = TokenCounts()
        self._device = sampling_device
        self.logit_bias = bias
        """What the request itself adds to logits, by token."""
        self._bias_tensors = self._as_tensors(bias)
        self._rules = RuleState(rules, prompt_ids) if rules else None
        self.prompt_ids = _ids(seen, sampling_device)
        self.early_end_ids = tuple(ends) if params.min_tokens else ()
        """The tokens that would end the completion, where it may not end before `min_tokens`."""
        self.end_ids = _ids(self.early_end_ids, sampling_device)
        self.sampled_tokens = 0
        self.sorted_width = 0
        """How many of its most likely tokens are to be sorted, where it is known that fewer do not do."""
        self.random_key = _random_key(params)

    @property
    def masked_ids(self) -> Tensor:
        """The tokens that would end the completion before `min_tokens`, or that the model's rules rule out.

        A completion whose grammar allows nothing but its end may end.
        """
        ends = self.end_ids if self._is_early else self.end_ids[:0]
        return ends if self._rules is None else torch.cat([ends, _ids(self._rules.masked(), self._device)])

    @property
    def bias(self) -> tuple[Tensor, Tensor]:
        """The tokens with a bias, each once, and (tokens,) float32 what is added to their logits."""
        if self._rules is None or not (biases := self._rules.biases()):
            return self._bias_tensors
        summed = {each: self.logit_bias.get(each, 0.0) + biases.get(each, 0.0) for each in self.logit_bias | biases}
        return self._as_tensors(summed)

    @property
    def has_penalty(self) -> bool:
        """Whether tokens that it has lower the logits of the next one."""
        return self.has_count_penalty or self.has_repetition_penalty

    @property
    def has_rules(self) -> bool:
        """Whether the model has rules of its own."""
        return self._rules is not None

    @property
    def changes_logits(self) -> bool:
        """Whether the next token is not chosen from the model's own logits."""
        return self.has_penalty or self.has_rules or bool(self.logit_bias) or self.grammar is not None or self._is_early

    @property
    def _is_early(self) -> bool:
        """Whether the completion may not end yet: before `min_tokens`, unless its grammar allows nothing else."""
        if self.sampled_tokens >= self.params.min_tokens:
            return False
        return bool(self.early_end_ids) and not (self.grammar is not None and self.grammar.must_end)

    def accept(self, token: int, *, ends: bool = False) -> None:
        """Record that this token was appended; one that ends the completion is no part of its grammar."""
        self.sampled_tokens += 1
        if self._rules is not None:
            self._rules.accept(token)
        if self.grammar is not None and not ends:
            self.grammar.accept(token)
        if self.has_penalty:
            self.counts.add(token)

    def draw(self) -> SamplingDraw:
        """Return the parameters and the random number of the next token; the same until `accept`."""
        params = self.params
        # Of a counter, not of a generator's state: calling it again does not use up a number.
        uniform = uniform_number(self.random_key, self.sampled_tokens)
        return SamplingDraw(params.temperature, self.top_k, params.top_p, params.min_p, uniform)

    def _as_tensors(self, bias: Mapping[int, float]) -> tuple[Tensor, Tensor]:
        values = torch.tensor(list(bias.values()), dtype=torch.float32, device=self._device)
        return _ids(bias, self._device), values


def _check_vocabulary(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    unknown = [token for token in tokens if not 0 <= token < vocab_size]
    if unknown:
        raise ValueError(f"{name} names token {unknown[0]}, but the vocabulary has ids 0 to {vocab_size - 1}.")


def _ids(tokens: Collection[int] | Mapping[int, float], device: torch.device) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=device)


def _sampling_device(device: torch.device) -> torch.device:
    """Return where logits from `device` are sampled: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _random_key(params: SamplingParams) -> int:
    """Return the key of a request's random numbers, a signed number of 64 bits."""
    if params.seed is None:
        key = secrets.token_bytes(8)
    else:
        key = hashlib.blake2b(f"{params.seed}/{params.sample}".encode(), digest_size=8).digest()
    return int.from_bytes(key, "little", signed=True)


@torch.inference_mode()
def sample(logits: Tensor, samplers: Sequence[SequenceSampler]) -> list[Sampled | SamplingFailure]:
    """Sample the next token of each row; a row without usable logits does not disturb the others.

    In this order: logit_bias, repetition, presence and frequency penalty, min_tokens, grammar, temperature, top_k,
    top_p, min_p.  Of equally likely tokens the lowest id comes first.  `accept` is left to the caller.

    Args:
        logits: (rows, vocab), any float type and device; not modified.
        samplers: one for each row of `logits`.
    Raises: ValueError: the shape of `logits` does not match the samplers and their vocabulary.
    """
    if logits.dim() != 2 or len(samplers) != logits.shape[0] or any(s.vocab_size != logits.shape[1] for s in samplers):
        raise ValueError(f"Logits of shape {tuple(logits.shape)} do not fit {len(samplers)} rows and their vocabulary.")
    logits = logits.to(_sampling_device(logits.device))
    results: dict[int, Sampled | SamplingFailure] = {}
    for width in (*TOPK_WIDTHS, logits.shape[1]):
        left = [row for row in range(len(samplers)) if row not in results]
        if not left:
            break
        found = _sample_within(gather_rows(logits, left), [samplers[row] for row in left], min(width, logits.shape[1]))
        results |= {row: result for row, result in zip(left, found, strict=True) if result is not None}
    return [results[row] for row in range(len(samplers))]


def _sample_within(
    logits: Tensor, samplers: Sequence[SequenceSampler], width: int
) -> list[Sampled | SamplingFailure | None]:
    """Sample with one transfer to the host; None for a row that may take more than its `width` most likely tokens."""
    tokens = _choose(logits, samplers, width)
    rows = reported_rows(samplers)
    return read_sampled(pack_sampled(logits, tokens, RowSet.of(rows, len(samplers), logits.device), samplers), samplers)


def reported_rows(samplers: Sequence[SequenceSampler]) -> list[int]:
    """Return the rows whose requests want log-probabilities."""
    return [row for row, sampler in enumerate(samplers) if sampler.params.logprobs is not None]


def pack_sampled(logits: Tensor, tokens: Tensor, reported: RowSet, samplers: Sequence[SequenceSampler]) -> Tensor:
    """Return one tensor that brings everything about the sampled tokens to the host.

    Args:
        tokens: (rows,) int64.
        reported: the rows whose log-probabilities are wanted.
    Returns: (rows,) int64, or (numbers,) float64, which holds every token id and every float32, with reports behind.
    """
    if not reported.count:
        return tokens
    with_top = any(sampler.params.logprobs for sampler in samplers)
    report = logprob_report(reported.gather(logits), reported.gather(tokens), with_top)
    return torch.cat([tokens.double(), report.flatten()])


def read_sampled(packed: Tensor, samplers: Sequence[SequenceSampler]) -> list[Sampled | SamplingFailure | None]:
    """Return what `pack_sampled` has packed; None for a row that may take more than its most likely tokens."""
    numbers = packed.tolist()
    results = [_result(int(token)) for token in numbers[: len(samplers)]]
    if len(numbers) == len(samplers):
        return results
    rows = reported_rows(samplers)
    width = (len(numbers) - len(samplers)) // len(rows)
    for index, row in enumerate(rows):
        result, start = results[row], len(samplers) + index * width
        if isinstance(result, Sampled):
            logprob = token_logprob(result.token, numbers[start : start + width], samplers[row].params.logprobs or 0)
            results[row] = Sampled(result.token, logprob)
    return results


def _result(token: int) -> Sampled | SamplingFailure | None:
    if token == NEEDS_WIDER_TOPK:
        return None
    if token == RULED_OUT:
        return NO_TOKEN_LEFT
    return NO_TOKEN if token == NO_VALID_TOKEN else Sampled(token)


def logprob_report(logits: Tensor, tokens: Tensor, with_top: bool) -> Tensor:
    """Return (rows, 1 + 2 * n) float64: the token's log-probability, the n highest ones, and their tokens.

    Of equals the lowest token comes first.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, tokens.clamp_min(0)[:, None])
    # A fixed number for any request: among equals at the edge, the number decides which ones are found.
    top = logprobs.topk(min(REPORTED_TOKENS, logprobs.shape[1]) if with_top else 0)
    tokens, order = top.indices.sort(dim=1)
    values, order = top.values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return torch.cat([own.double(), values.double(), tokens.gather(1, order).double()], dim=1)


def token_logprob(token: int, report: Sequence[float], count: int) -> TokenLogprob:
    """Return a row of `logprob_report` as the record of a token.  Args: count: how many of the most likely it lists."""
    top_count = len(report) // 2
    values, tokens = report[1 : 1 + min(count, top_count)], report[1 + top_count :]
    top = tuple((int(each), value) for value, each in zip(values, tokens, strict=False) if value > -torch.inf)
    return TokenLogprob(token, report[0], top)


def _choose(logits: Tensor, samplers: Sequence[SequenceSampler], width: int) -> Tensor:
    """Return (rows,) int64: each row's token, NO_VALID_TOKEN, RULED_OUT or NEEDS_WIDER_TOPK.

    Rows are grouped by method, which follows from a row's own parameters alone.
    """
    groups: dict[str, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(_method(sampler, width), []).append(row)
    chosen = [
        _choose_by(method, gather_rows(logits, rows), [samplers[row] for row in rows], width)
        for method, rows in groups.items()
    ]
    order = [row for rows in groups.values() for row in rows]
    return gather_rows(torch.cat(chosen), sorted(range(len(samplers)), key=order.__getitem__))


def _method(sampler: SequenceSampler, width: int) -> str:
    if sampler.params.temperature == 0:
        return "changed greedy" if sampler.changes_logits else "greedy"
    if sampler.params.top_p == 1 and not sampler.top_k:
        return "unsorted"
    return "sorted" if sampler.top_k < width or width == sampler.vocab_size else "wider"


def _choose_by(method: str, logits: Tensor, samplers: Sequence[SequenceSampler], width: int) -> Tensor:
    if method == "greedy":
        return argmax_tokens(logits)
    if method == "wider":
        return torch.full((len(samplers),), NEEDS_WIDER_TOPK, device=logits.device)
    changed = _changed_logits(logits, samplers)
    if method == "changed greedy":
        tokens = argmax_tokens(changed)
    else:
        draws = DrawColumns.of([sampler.draw() for sampler in samplers], logits.device)
        tokens = sample_unsorted(changed, draws) if method == "unsorted" else sample_sorted(changed, draws, width)
    return name_failures(tokens, logits.amax(dim=-1).isfinite())


def _changed_logits(logits: Tensor, samplers: Sequence[SequenceSampler]) -> Tensor:
    """Return (rows, vocab) float32 logits after bias, penalties, min_tokens and grammars.

    `logits` itself if nothing changes.
    """
    if not any(sampler.changes_logits for sampler in samplers):
        return logits.float()
    changed, params = logits.to(torch.float32, copy=True), [sampler.params for sampler in samplers]
    sampled = [sampler.counts.tokens() if sampler.has_repetition_penalty else NO_TOKENS for sampler in samplers]
    prompts = [sampler.prompt_ids for sampler in samplers]
    apply_logit_bias(changed, *zip(*(sampler.bias for sampler in samplers), strict=True))
    apply_repetition_penalty(changed, [prompts, sampled], [each.repetition_penalty for each in params])
    apply_presence_and_frequency(
        changed,
        [sampler.counts if sampler.has_count_penalty else None for sampler in samplers],
        [(each.presence_penalty, each.frequency_penalty) for each in params],
    )
    mask_tokens(changed, [sampler.masked_ids for sampler in samplers])
    apply_grammars(changed, [sampler.grammar for sampler in samplers])
    return changed
