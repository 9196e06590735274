"""Turn the scores of one model step into next tokens, each row of the batch with its own settings.

Decides which scores the settings change, and what is told of log-probabilities.  Knows no models, no requests and no
ends of answers: the runner keeps one `RowSampler` for each answer, calls `sample` after each forward pass, and `accept`
for each token it takes.
"""

import hashlib
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.types import SamplingParams, TokenLogprob
from app.worker.sampling.penalties import NO_TOKENS, TokenCounts, add_bias, penalise_counts, penalise_repeats, rule_out
from app.worker.sampling.sampling_ops import UNUSABLE, WIDE, Draw, draw_any, draw_ranked, most_likely, pick

WIDTHS = (256, 4096)
"""How many of a row's most likely tokens are put in order: the first width that holds all it may take, else all."""
REPORTED = 32
"""Most likely tokens fetched for a report: the 20 that can be asked for, and room for equals of the last one."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of one row."""

    token: int
    logprob: TokenLogprob | None = None
    """Only where the request asked for it.  Tokens that the model rules out (-inf) are not among its `top`."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """No token can be drawn from this row's scores: its answer cannot go on."""

    reason: str


NO_TOKEN = Unusable("No token can be chosen: the scores are not finite, or the request's settings rule out all tokens.")


class RowSampler:
    """What one answer's sampling needs to remember from token to token."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Begin an answer.

        Args:
            end_ids: the end tokens that `min_tokens` holds back, beside `stop_token_ids`.
            vocab_size: width of the model's scores.
            device: where the scores will be; elsewhere it works too, but slower.
        Raises: ValueError: a token id lies outside the vocabulary.
        """
        bias: dict[int, float] = {}
        for token, value in params.logit_bias:
            bias[token] = bias.get(token, 0.0) + value
        seen = set(prompt_ids) if params.repetition_penalty != 1 else set()
        _refuse_unknown("logit_bias", bias, vocab_size)
        _refuse_unknown("stop_token_ids", params.stop_token_ids, vocab_size)
        _refuse_unknown("The prompt", seen, vocab_size)
        # A model may name an end token that it has no score for.
        ends = {*params.stop_token_ids, *(token for token in end_ids if 0 <= token < vocab_size)}
        home = _home(torch.device(device))

        self.params = params
        self.vocab_size = vocab_size
        self.top_k = params.top_k if params.top_k < vocab_size else 0
        self.counted = params.presence_penalty != 0 or params.frequency_penalty != 0
        self.repeats = params.repetition_penalty != 1
        self.counts = TokenCounts()
        self.bias_ids, self.bias = _ids(bias, home), torch.tensor(list(bias.values()), dtype=torch.float32, device=home)
        self.prompt_ids = _ids(seen, home)
        self.end_ids = _ids(ends if params.min_tokens else (), home)
        self._made = 0
        self._stream = _stream(params)

    @property
    def held_back(self) -> Tensor:
        """The tokens that would end the answer too early."""
        return self.end_ids if self._made < self.params.min_tokens else self.end_ids[:0]

    @property
    def changes_scores(self) -> bool:
        """Whether the next token is not chosen from the model's own scores."""
        return self.counted or self.repeats or self.bias_ids.numel() > 0 or self.held_back.numel() > 0

    def accept(self, token: int) -> None:
        """Take note that the answer got this token."""
        self._made += 1
        if self.counted or self.repeats:
            self.counts.add(token)

    def draw(self) -> Draw:
        """Return how the next token is drawn; the same until `accept`."""
        params = self.params
        # A counter hashed with the seed, not a generator's state: asking again does not use up a number.
        digest = hashlib.blake2b(self._made.to_bytes(8, "little"), key=self._stream, digest_size=8).digest()
        uniform = (int.from_bytes(digest, "little") >> 11) * 2.0**-53
        return Draw(params.temperature, self.top_k, params.top_p, params.min_p, uniform)


def _refuse_unknown(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    unknown = [token for token in tokens if not 0 <= token < vocab_size]
    if unknown:
        raise ValueError(f"{name} names token {unknown[0]}, but the vocabulary has ids 0 to {vocab_size - 1}.")


def _ids(tokens: Collection[int], device: torch.device) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=device)


def _home(device: torch.device) -> torch.device:
    """Where scores from `device` are sampled: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _stream(params: SamplingParams) -> bytes:
    """Return the key of an answer's random numbers."""
    if params.seed is None:
        return secrets.token_bytes(32)
    return hashlib.blake2b(f"{params.seed}/{params.sample}".encode(), digest_size=32).digest()


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[RowSampler]) -> list[Sampled | Unusable]:
    """Draw the next token of each row; a row without usable scores does not disturb the others.

    In this order: logit_bias, repetition, presence and frequency penalty, min_tokens, temperature, top_k, top_p,
    min_p.  Of equally likely tokens the lowest id comes first.  `accept` is left to the caller.

    Args:
        logits: (rows, vocab), any float type and device; stays as it is.
        rows: one for each row of `logits`.
    Raises: ValueError: `logits` does not have a row for each of `rows`, or not the width that they were told.
    """
    if logits.dim() != 2 or len(rows) != logits.shape[0] or any(row.vocab_size != logits.shape[1] for row in rows):
        raise ValueError(f"Scores of shape {tuple(logits.shape)} do not fit {len(rows)} rows and their vocabulary.")
    logits = logits.to(_home(logits.device))
    answers: dict[int, Sampled | Unusable] = {}
    for width in (*WIDTHS, logits.shape[1]):
        waiting = [place for place in range(len(rows)) if place not in answers]
        if not waiting:
            break
        found = _sample_within(pick(logits, waiting), [rows[place] for place in waiting], min(width, logits.shape[1]))
        answers |= {place: answer for place, answer in zip(waiting, found, strict=True) if answer is not None}
    return [answers[place] for place in range(len(rows))]


def _sample_within(logits: Tensor, rows: Sequence[RowSampler], width: int) -> list[Sampled | Unusable | None]:
    """Draw with one transfer to the host; None for a row that may take more than its `width` most likely tokens."""
    tokens = _choose(logits, rows, width)
    wanted = {place: row.params.logprobs for place, row in enumerate(rows) if row.params.logprobs is not None}
    if not wanted:
        return [_answer(token) for token in tokens.tolist()]
    report = _report(pick(logits, list(wanted)), pick(tokens, list(wanted)), any(wanted.values()))
    # One list brings all: float64 holds every token id and every float32.
    host = torch.cat([tokens.double(), report.flatten()]).tolist()
    answers = [_answer(int(token)) for token in host[: len(rows)]]
    for at, (place, count) in enumerate(wanted.items()):
        answer, start = answers[place], len(rows) + at * report.shape[1]
        if isinstance(answer, Sampled):
            logprob = _logprob(answer.token, host[start : start + report.shape[1]], count)
            answers[place] = Sampled(answer.token, logprob)
    return answers


def _answer(token: int) -> Sampled | Unusable | None:
    if token == WIDE:
        return None
    return NO_TOKEN if token == UNUSABLE else Sampled(token)


def _report(logits: Tensor, tokens: Tensor, with_top: bool) -> Tensor:
    """(rows, 1 + 2 * n) float64: log-probability of the token, the n highest ones, and their tokens."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, tokens.clamp_min(0)[:, None])
    # As many whatever was asked for: of equals at the edge, the number decides which ones are found.
    top = logprobs.topk(min(REPORTED, logprobs.shape[1]) if with_top else 0)
    return torch.cat([own.double(), top.values.double(), top.indices.double()], dim=1)


def _logprob(token: int, report: Sequence[float], wanted: int) -> TokenLogprob:
    found = len(report) // 2
    pairs = zip(map(int, report[1 + found :]), report[1 : 1 + found], strict=True)
    top = sorted((pair for pair in pairs if pair[1] > -torch.inf), key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(token, report[0], tuple(top[:wanted]))


def _choose(logits: Tensor, rows: Sequence[RowSampler], width: int) -> Tensor:
    """(rows,) int64: each row's token, UNUSABLE or WIDE.  A row's own settings alone decide how it is computed."""
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(_way(row, width), []).append(place)
    parts = [
        _choose_by(way, pick(logits, places), [rows[place] for place in places], width)
        for way, places in groups.items()
    ]
    order = [place for places in groups.values() for place in places]
    return pick(torch.cat(parts), sorted(range(len(rows)), key=order.__getitem__))


def _way(row: RowSampler, width: int) -> str:
    if row.params.temperature == 0:
        return "changed greedy" if row.changes_scores else "greedy"
    if row.params.top_p == 1 and not row.top_k:
        return "any"
    return "ranked" if row.top_k < width or width == row.vocab_size else "wide"


def _choose_by(way: str, logits: Tensor, rows: Sequence[RowSampler], width: int) -> Tensor:
    if way == "greedy":
        return most_likely(logits)
    if way == "wide":
        return torch.full((len(rows),), WIDE, device=logits.device)
    scores = _changed(logits, rows)
    if way == "changed greedy":
        found = most_likely(scores)
    else:
        draws = [row.draw() for row in rows]
        found = draw_any(scores, draws) if way == "any" else draw_ranked(scores, draws, width)
    # NaN or +inf may have been where no token is allowed, but would be in the log-probabilities.
    return found.where(logits.amax(dim=-1).isfinite(), UNUSABLE)


def _changed(logits: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """(rows, vocab) float32: the scores after bias, penalties and min_tokens; `logits` itself where nothing changes."""
    if not any(row.changes_scores for row in rows):
        return logits.float()
    scores, params = logits.to(torch.float32, copy=True), [row.params for row in rows]
    made = [row.counts.tokens() if row.repeats else NO_TOKENS for row in rows]
    add_bias(scores, [row.bias_ids for row in rows], [row.bias for row in rows])
    penalise_repeats(scores, [[row.prompt_ids for row in rows], made], [each.repetition_penalty for each in params])
    penalise_counts(
        scores,
        [row.counts if row.counted else None for row in rows],
        [(each.presence_penalty, each.frequency_penalty) for each in params],
    )
    rule_out(scores, [row.held_back for row in rows])
    return scores
