"""The sampler draws from what each row's parameters allow, repeatably, and no row notices another."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from app.types import SamplingParams
from app.worker.sampling.penalties import apply_repetition_penalty
from app.worker.sampling.sampler import NO_TOKEN, NO_TOKEN_LEFT, Sampled, SamplingFailure, SequenceSampler, sample
from app.worker.sampling.sampling_ops import SamplingDraw
from tests.examples import examples

GRID = 200
LAST = 1 - 2**-53
"""The highest number a row can draw."""
INF, NAN = math.inf, math.nan


class Given(SequenceSampler):
    """A row that draws a given number instead of its seed's."""

    def __init__(self, *args: Any, uniform: float) -> None:
        super().__init__(*args)
        self.uniform = uniform

    def draw(self) -> SamplingDraw:
        return super().draw()._replace(uniform=self.uniform)


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1000, "temperature": 1.0, "seed": 5} | changes)


def row(
    vocab: int, *, prompt: Sequence[int] = (), sampled: Sequence[int] = (), ends: Any = (), **changes: Any
) -> SequenceSampler:
    sampler = SequenceSampler(params(**changes), prompt, ends, vocab)
    for token in sampled:
        sampler.accept(token)
    return sampler


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def token(scores: torch.Tensor, sampler: SequenceSampler) -> int | None:
    """Sample a single row."""
    (result,) = sample(scores[None], [sampler])
    return result.token if isinstance(result, Sampled) else None


def advance(scores: torch.Tensor, sampler: SequenceSampler) -> int:
    """Sample the next token of a row, and add it to the row."""
    drawn = token(scores, sampler)
    assert drawn is not None
    sampler.accept(drawn)
    return drawn


def tokens_over_grid(
    scores: torch.Tensor, changes: dict[str, Any], prompt: Any = (), sampled: Any = (), ends: Any = (), grid: int = GRID
) -> Counter[int]:
    """Count the tokens drawn by evenly spaced numbers: within one of `grid` times their probability."""
    places = [(place + 0.5) / grid for place in range(grid)]
    rows = [Given(params(**changes), prompt, ends, len(scores), uniform=place) for place in places]
    for sampler in rows:
        for each in sampled:
            sampler.accept(each)
    return Counter(result.token for result in sample(scores.repeat(grid, 1), rows) if isinstance(result, Sampled))


def naive(
    scores: list[float], request: SamplingParams, prompt: Sequence[int], sampled: Sequence[int], ends: Sequence[int]
):
    """Each token's probability, in plain Python and the order that the settings are defined in."""
    scores, counts = list(scores), Counter(sampled)
    for each, bias in request.logit_bias:
        scores[each] += bias
    for each in {*prompt, *sampled}:
        scores[each] *= 1 / request.repetition_penalty if scores[each] > 0 else request.repetition_penalty
    for each, count in counts.items():
        scores[each] -= request.presence_penalty + count * request.frequency_penalty
    if len(sampled) < request.min_tokens:
        for each in {*ends, *request.stop_token_ids}:
            scores[each] = -INF
    order = sorted(range(len(scores)), key=lambda each: (-scores[each], each))
    if request.temperature == 0:
        return {order[0]: 1.0}
    weights = [math.exp((score - scores[order[0]]) / request.temperature) for score in scores]
    order = order[: request.top_k or None]
    total, mass, nucleus = sum(weights[each] for each in order), 0.0, []
    for each in order:
        if mass < request.top_p * total and weights[each] >= request.min_p and weights[each] > 0:
            nucleus.append(each)
        mass += weights[each]
    total = sum(weights[each] for each in nucleus)
    return {each: weights[each] / total for each in nucleus}


@examples(100)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 2, 7, 60, 255, 256, 257, 511, 512, 513, 700, 5000]),
    spread=st.sampled_from([0.5, 3.0, 12.0]),
    changes=st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7])},
        optional={
            "top_k": st.sampled_from([1, 3, 40, 256, 300, 6000]),
            "top_p": st.sampled_from([1e-6, 0.3, 0.8, 0.97]),
            "min_p": st.sampled_from([0.02, 0.3, 1.0]),
            "repetition_penalty": st.sampled_from([0.7, 1.3]),
            "presence_penalty": st.sampled_from([-1.0, 0.6]),
            "frequency_penalty": st.sampled_from([-0.4, 0.3]),
            "min_tokens": st.sampled_from([3, 4]),
        },
    ),
    biased=st.booleans(),
)
def test_tokens_are_drawn_as_a_plain_calculation_says(
    seed: int, vocab: int, spread: float, changes: dict[str, Any], biased: bool
):
    """Every allowed token as often as its probability, and no other token, whatever settings come together."""
    source = random.Random(seed)
    scores = torch.tensor([source.gauss(0, spread) for _ in range(vocab)])
    prompt, sampled = ([source.randrange(vocab) for _ in range(length)] for length in (9, 3))
    ends = [int(scores.argmax())] if vocab > 1 else []
    if biased:
        changes = changes | {"logit_bias": ((vocab // 2, 2.5), (0, -100.0))}

    drawn = tokens_over_grid(scores, changes, prompt, sampled, ends)

    expected = naive(scores.tolist(), params(**changes), prompt, sampled, ends)
    assert set() == set(drawn) - set(expected)
    assert GRID == drawn.total()
    assert all(abs(drawn[each] - share * GRID) < 1.01 for each, share in expected.items())


WARPED = [
    {"top_k": 40},
    {"top_k": 300},
    {"top_k": 9000},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.995},
    {"min_p": 0.05},
    {"temperature": 0.6, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 2000, "top_p": 0.9, "min_p": 0.001},
    {"temperature": 3.0, "top_p": 0.95, "min_p": 0.2},
]


@pytest.mark.parametrize("changes", WARPED)
def test_the_allowed_tokens_are_those_of_transformers(changes: dict[str, Any]):
    """In a vocabulary of 50,000 all numbers draw from that set, and the highest reaches its least likely token."""
    scores, request = noise(50_000), params(**changes)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(request.temperature)])
    warpers += [TopKLogitsWarper(request.top_k)] if request.top_k else []
    warpers += [TopPLogitsWarper(request.top_p)] if request.top_p < 1 else []
    warpers += [MinPLogitsWarper(request.min_p)] if request.min_p else []
    no_ids: Any = torch.empty(1, 0, dtype=torch.long)
    allowed = warpers(no_ids, scores[None])[0].isfinite().nonzero()[:, 0].tolist()

    drawn = set(tokens_over_grid(scores, changes, grid=30))
    last = token(scores, Given(request, (), (), len(scores), uniform=LAST))

    assert drawn <= set(allowed)
    assert (max(allowed) if set(changes) == {"min_p"} else min(allowed, key=lambda each: float(scores[each]))) == last


def test_the_repetition_penalty_is_that_of_transformers():
    """Bit for bit the same scores, with tokens that are repeated, in both prompt and completion, and below 0."""
    scores, prompt, sampled = noise(2, 300), [1, 2, 2, 3], [[3, 9, 9], [200, 1, 3]]
    penalise = [RepetitionPenaltyLogitsProcessor(penalty) for penalty in (1.3, 0.8)]
    expected = [
        each(torch.tensor([prompt + tokens]), line[None].clone())[0]
        for each, tokens, line in zip(penalise, sampled, scores, strict=True)
    ]

    apply_repetition_penalty(
        scores, [[torch.tensor([1, 2, 3])] * 2, [torch.tensor([3, 9]), torch.tensor(sampled[1])]], [1.3, 0.8]
    )

    assert torch.equal(torch.stack(expected), scores)


def test_only_the_completion_counts_for_presence_and_frequency():
    """A token of the prompt keeps its score; one sampled three times loses presence once and frequency three times."""
    scores = torch.tensor([5.0, 3.0, 2.0])
    penalties: dict[str, Any] = {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 0.5}

    assert 0 == token(scores, row(3, prompt=[0, 0, 0, 0], **penalties))
    assert 0 == token(scores, row(3, sampled=[0], **penalties))
    assert 1 == token(scores, row(3, sampled=[0, 0, 0], **penalties))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_temperature_0_takes_the_most_likely_token(dtype: torch.dtype):
    """For each row alike, and the lowest id of equal ones, also where bias changes the scores."""
    scores = noise(3, 50_000).to(dtype)
    scores[2, [7, 41_000, 300]] = 60
    expected = [int(line.argmax()) for line in scores]
    greedy = [row(50_000, temperature=0.0) for _ in expected]
    biased = [row(50_000, temperature=0.0, logit_bias=((0, -1.0),)) for _ in expected]

    assert 7 == expected[2]
    assert expected == [result.token for result in sample(scores, greedy) if isinstance(result, Sampled)]
    assert expected == [result.token for result in sample(scores, biased) if isinstance(result, Sampled)]


@pytest.mark.parametrize("equal", [3, 300, 5000])
def test_of_equally_likely_tokens_the_lowest_ids_are_kept(equal: int):
    """top_k keeps as many as it says, however many there are, and top_k 1 is greedy."""
    scores = noise(6000).clamp_max(4)
    scores[1000 : 1000 + equal] = 5

    assert {1000: GRID} == tokens_over_grid(scores, {"top_k": 1})
    assert {1000: GRID / 2, 1001: GRID / 2} == tokens_over_grid(scores, {"top_k": 2})


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-6, 1e30])
def test_an_extreme_temperature_still_draws(temperature: float):
    """Next to 0 it is greedy, without bounds every token is as likely."""
    drawn = tokens_over_grid(torch.tensor([1.0, 80.0, -50.0, 79.0]), {"temperature": temperature})
    ranked = tokens_over_grid(torch.tensor([1.0, 80.0, -50.0, 79.0]), {"temperature": temperature, "top_k": 2})

    assert ({1: GRID} if temperature < 1 else dict.fromkeys(range(4), GRID // 4)) == drawn
    assert ({1: GRID} if temperature < 1 else {1: GRID // 2, 3: GRID // 2}) == ranked


@pytest.mark.parametrize("uniform", [0.4, 0.7, 0.999])
def test_many_small_probabilities_add_up(uniform: float):
    """A likely token and 260,000 unlikely ones: rounding moves the drawn one by two ids at the most."""
    scores = torch.full((260_001,), -12.0)
    scores[0] = 0
    weight = math.exp(-12)

    drawn = token(scores, Given(params(), (), (), len(scores), uniform=uniform))

    assert drawn == pytest.approx((uniform * (1 + 260_000 * weight) - 1) / weight + 1, abs=2)


def test_the_highest_number_draws_no_impossible_token():
    """Rounding at the end of the running sums does not lead into tokens without probability."""
    for seed in range(40):
        scores = noise(1300, seed=seed)
        scores[seed * 20 :: 2] = -INF
        scores[900:] = -INF
        for changes in ({}, {"min_p": 0.3}, {"top_k": 50}, {"top_p": 0.999}):
            drawn = token(scores, Given(params(**changes), (), (), len(scores), uniform=LAST))
            assert drawn is not None
            assert scores[drawn] > -INF


def test_a_token_may_not_end_a_short_completion():
    """End and stop tokens come first at `min_tokens`; an end token that has no score is no matter."""
    scores, sampler = torch.tensor([9.0, 8.0, 7.0, 6.0]), row(4, ends=(0, 70), stop_token_ids=(1,), min_tokens=2)
    scores *= 20
    sampled = [advance(scores, sampler) for _ in range(3)]

    assert [2, 2, 0] == sampled
    assert 0 == token(scores, row(4, ends=(0,), ignore_eos=True))


ROWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.4, "logprobs": 3},
    {},
    {"sample": 1},
    {"temperature": 0.7, "min_p": 0.02},
    {"top_k": 30, "seed": 6},
    {"top_k": 700, "top_p": 0.9},
    {"top_p": 0.9, "logprobs": 5},
    {"temperature": 2.0, "top_p": 0.99},
    {"presence_penalty": 1.0, "frequency_penalty": 0.3, "top_p": 0.5, "logit_bias": ((3, 6.0),)},
    {"min_tokens": 6, "stop_token_ids": (4, 5)},
]


def results_of(
    which: Sequence[int], broken: Sequence[int] = (), steps: int = 10
) -> dict[int, list[Sampled | SamplingFailure]]:
    """Sample rows together, each from its own scores, which depend on the token before; `broken` rows have NaN."""
    scores = noise(len(ROWS), 40, 1000, seed=3)
    scores[list(broken), :, 17] = NAN
    rows = [row(1000, prompt=(1, 2, 3), ends=(9,), **ROWS[place]) for place in which]
    sampled: dict[int, list[Sampled | SamplingFailure]] = {place: [] for place in which}
    last = dict.fromkeys(which, 0)
    for _ in range(steps):
        step = torch.stack([scores[place, last[place] % 40] for place in which])
        for place, sampler, result in zip(which, rows, sample(step, rows), strict=True):
            sampled[place].append(result)
            if isinstance(result, Sampled):
                last[place] = result.token
                sampler.accept(result.token)
    return sampled


@examples(25)
@given(order=st.permutations(range(len(ROWS))), size=st.integers(1, len(ROWS)))
def test_a_row_is_sampled_as_if_it_were_alone(order: list[int], size: int):
    """The same tokens and log-probabilities in any company and at any place of the batch."""
    single = {place: results_of([place])[place] for place in order[:size]}

    assert single == results_of(order[:size])


@pytest.mark.parametrize("broken", [(0,), (2, 7), (1, 5, 6, 8, 9)])
def test_a_row_without_scores_ends_alone(broken: tuple[int, ...]):
    """It gets the reason at every step, and its neighbours the completions that they get without it."""
    everyone, others = range(len(ROWS)), [place for place in range(len(ROWS)) if place not in broken]

    found = results_of(everyone, broken)

    assert [[NO_TOKEN] * 10] * len(broken) == [found[place] for place in broken]
    assert results_of(others) == {place: found[place] for place in others}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("changes", [*ROWS, {"top_k": 5000}])
def test_scores_that_are_not_finite_give_no_token(bad: float, changes: dict[str, Any]):
    """One NaN or +inf is enough, -inf has to be everywhere; also where that token would be held back."""
    scores, ends = noise(6000), (9,)
    scores[9 if bad != -INF else slice(None)] = bad

    assert [NO_TOKEN] == sample(scores[None], [row(6000, ends=ends, **{"min_tokens": 1} | changes)])
    assert [NO_TOKEN] == sample(scores[None].bfloat16(), [row(6000, **changes)])


def test_settings_that_rule_out_every_token_end_the_row():
    """The only tokens that the model allows are end tokens, and the completion is too short for them."""
    scores = torch.tensor([[1.0, -INF, 2.0], [1.0, -INF, 2.0]])

    found = sample(scores, [row(3, ends=(0, 2), min_tokens=1), row(3, ends=(0, 2), temperature=0.0)])

    assert [NO_TOKEN_LEFT, Sampled(2)] == found


def test_a_seed_and_a_sample_repeat_a_completion():
    """Other seeds and samples differ, and so do two completions without a seed."""
    scores = torch.zeros(500)

    def completion(**changes: Any) -> tuple[int, ...]:
        sampler = row(500, **changes)
        return tuple(advance(scores, sampler) for _ in range(8))

    assert completion(seed=1, sample=2) == completion(seed=1, sample=2)
    kinds = [{"seed": seed, "sample": place} for seed in (-1, 0, 1, 2) for place in range(3)] + [{"seed": None}] * 2
    assert len(kinds) == len({completion(**changes) for changes in kinds})


def test_seeded_numbers_are_even():
    """Over 4,000 tokens each of eight equal ones comes about as often, and as often after each other one."""
    rows = [row(8, sample=place) for place in range(40)]
    sampled: list[list[int]] = [[] for _ in rows]
    for _ in range(100):
        for sampler, result, line in zip(rows, sample(torch.zeros(40, 8), rows), sampled, strict=True):
            assert isinstance(result, Sampled)
            line.append(result.token)
            sampler.accept(result.token)
    single = Counter(each for line in sampled for each in line)
    pairs = Counter(pair for line in sampled for pair in pairwise(line))

    assert all(420 < single[each] < 580 for each in range(8))
    assert all(30 < pairs[each, after] < 100 for each in range(8) for after in range(8))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": 0.4, "top_k": 3},
        {"top_p": 0.99999, "temperature": 9.0},
        {"logit_bias": ((4, 50.0),), "repetition_penalty": 2.0, "frequency_penalty": 2.0, "min_tokens": 50},
    ],
)
def test_log_probabilities_are_the_models_own(changes: dict[str, Any]):
    """Of the chosen token and the likeliest ones, sorted, equal ones by id, whatever the settings did to the scores."""
    scores = noise(6000)
    scores[[5000, 40, 3000]] = scores.max()
    expected = scores.log_softmax(dim=-1)
    best = expected.argsort(descending=True, stable=True)[:7].tolist()

    (found,) = sample(scores[None], [row(6000, prompt=best, sampled=best, ends=best[:2], logprobs=7, **changes)])

    assert isinstance(found, Sampled)
    assert found.logprob is not None
    assert (found.token, float(expected[found.token])) == (found.logprob.token_id, found.logprob.logprob)
    assert tuple((each, float(expected[each])) for each in best) == found.logprob.top


def test_each_row_gets_the_log_probabilities_it_requested():
    """None requests no report and 0 the chosen token alone; impossible tokens are left out."""
    scores = torch.tensor([1.0, 3.0, -INF, 3.0, 2.0]).repeat(4, 1)
    counts = (None, 0, 2, 20)

    found = sample(scores, [row(5, temperature=0.0, logprobs=count) for count in counts])

    reports = [result.logprob for result in found if isinstance(result, Sampled)]
    assert [None, (), (1, 3), (1, 3, 4, 0)] == [
        None if report is None else tuple(each for each, _ in report.top) for report in reports
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_callers_scores_stay_as_they_are(dtype: torch.dtype):
    """Alone or in company, with settings that change or mask scores."""
    scores = noise(len(ROWS), 1000).to(dtype)
    before = scores.clone()

    sample(scores, [row(1000, prompt=(1, 2), sampled=(3, 3), ends=(4,), **changes) for changes in ROWS])
    for place, changes in enumerate(ROWS):
        sample(scores[place : place + 1], [row(1000, prompt=(1, 2), sampled=(3, 3), ends=(4,), **changes)])

    assert torch.equal(before, scores)


@pytest.mark.parametrize(
    ("changes", "prompt", "name"),
    [
        ({"logit_bias": ((2, 1.0), (5, 1.0))}, (), "logit_bias names token 5"),
        ({"stop_token_ids": (-1,)}, (), "stop_token_ids names token -1"),
        ({"repetition_penalty": 1.1}, (1, 9), "The prompt names token 9"),
    ],
)
def test_a_token_outside_the_vocabulary_is_refused(changes: dict[str, Any], prompt: Sequence[int], name: str):
    """When the completion begins, with the setting, the token and the range."""
    with pytest.raises(ValueError, match=f"{name}, but the vocabulary has ids 0 to 4."):
        row(5, prompt=prompt, **changes)


def test_scores_that_do_not_fit_the_rows_are_refused():
    """Neither their number nor the width may differ."""
    for shape in ((2, 5), (1, 6), (5,)):
        with pytest.raises(ValueError, match="do not fit 1 rows"):
            sample(torch.zeros(shape), [row(5)])
    assert [] == sample(torch.zeros(0, 5), [])
