"""Log-probabilities of prompts: those of an ordinary forward pass, however the prompt was computed."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from app.ipc.messages import Compile, TokenEvent
from app.types import TokenLogprob
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import Segment
from app.worker.sampling import prompt_scoring
from app.worker.sampling.prompt_scoring import max_scored_tokens, score_tokens
from app.worker.sampling.sampler import SamplingFailure
from app.worker.scheduling import schedule
from app.worker.scheduling.schedule import ScoringBudget
from app.worker.scheduling.scheduler import Scheduler
from app.worker.scheduling.step_time import StepTimeModel
from tests.unit.worker.families import FAMILIES, VOCABULARY, make
from tests.unit.worker.test_batching_runner import PROMPTS, complete, completion_of, ending_of, run, runner_for, submit

LONG = [(11 * i + 5) % VOCABULARY for i in range(60)]


@pytest.fixture(scope="module")
def llama() -> Any:
    return make(FAMILIES["llama"])


@torch.inference_mode()
def reference(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    """Return (tokens - 1, vocab) float32: what an ordinary forward pass makes of each next token."""
    model.set_attn_implementation("eager")
    logits: torch.Tensor = model(input_ids=torch.tensor([prompt])).logits[0, :-1].float().log_softmax(dim=-1)
    return logits


def scores_of(events: Sequence[TokenEvent], number: int = 1) -> list[TokenLogprob]:
    return [each for event in events if event.id == number for each in event.prompt_logprobs]


def assert_right(scores: Sequence[TokenLogprob], prompt: Sequence[int], expected: torch.Tensor) -> None:
    """Compare tokens, log-probabilities, alternatives and ranks with those of the forward pass."""
    assert list(prompt[1:]) == [each.token_id for each in scores]
    for score, row in zip(scores, expected, strict=True):
        assert score.logprob == pytest.approx(float(row[score.token_id]), abs=1e-4)
        assert score.rank == 1 + int((row > row[score.token_id]).sum())
        for (token, logprob), best in zip(score.top, row.topk(len(score.top)).values.tolist(), strict=True):
            assert logprob == pytest.approx(float(row[token]), abs=1e-4) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("compiled", [None, "auto"], ids=["torch", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_scored_as_by_a_forward_pass(family: str, compiled: Compile | None):
    """To 1e-4 in float32, in one batch of prompts that are scored and prompts that are not, which begin in turn."""
    model = make(FAMILIES[family])
    prompts = [*PROMPTS, LONG[:40]]
    expected = {number: reference(model, prompt) for number, prompt in enumerate(prompts)}
    runner, events = runner_for(make(FAMILIES[family]), slots=3, compiled=compiled), list[TokenEvent]()
    for number, prompt in enumerate(prompts):
        submit(runner, prompt, number, max_tokens=3, prompt_logprobs=number)
        submit(runner, prompt, 100 + number, max_tokens=3)
        runner.step(events.extend)
    events += run(runner)
    for number, prompt in enumerate(prompts):
        assert_right(scores_of(events, number), prompt, expected[number])
        assert all(number == len(each.top) for each in scores_of(events, number))
        assert [] == scores_of(events, 100 + number)
        assert completion_of(events, 100 + number) == completion_of(events, number) != []


def test_a_prompt_is_scored_in_as_many_steps_as_memory_needs(llama: Any, monkeypatch: pytest.MonkeyPatch):
    """However few rows a step may have, in total; what is scored at once is bounded once more."""
    monkeypatch.setattr(prompt_scoring, "HOST_BYTES", 4 * VOCABULARY * 20)
    monkeypatch.setattr(prompt_scoring, "BLOCK_BYTES", 4 * VOCABULARY * 3)
    runner, rows, forward = runner_for(llama), list[int](), ModelRunner.forward

    def count_rows(self: ModelRunner, segments: Sequence[Segment], wanted: Sequence[int]) -> torch.Tensor:
        rows.append(sum(wanted))
        return forward(self, segments, wanted)

    monkeypatch.setattr(ModelRunner, "forward", count_rows)
    submit(runner, LONG, 1, max_tokens=1, prompt_logprobs=2)
    submit(runner, LONG[::-1], 2, max_tokens=1, prompt_logprobs=0)
    events = run(runner)
    assert_right(scores_of(events, 1), LONG, reference(llama, LONG))
    assert_right(scores_of(events, 2), LONG[::-1], reference(llama, LONG[::-1]))
    assert max(rows) <= 20 + 2


def test_a_vocabulary_of_any_size_leaves_some_rows():
    """The memory is a bound of the rows, and never of none."""
    assert 64 * 1024 * 1024 // (4 * 128_000) == max_scored_tokens(128_000, "cpu") < max_scored_tokens(128_000, "cuda")
    assert prompt_scoring.MIN_ROWS == max_scored_tokens(10**9, "cpu")


def test_no_token_is_sampled_where_none_is_wanted(llama: Any):
    """The prompt is scored, and the end comes without a token; one token alone has nothing before it."""
    runner = runner_for(llama)
    submit(runner, PROMPTS[2], 1, max_tokens=0, prompt_logprobs=0)
    submit(runner, PROMPTS[0], 2, max_tokens=0, prompt_logprobs=0)
    submit(runner, PROMPTS[2], 3, max_tokens=0)
    events = run(runner)
    assert_right(scores_of(events, 1), PROMPTS[2], reference(llama, PROMPTS[2]))
    assert [] == scores_of(events, 2) == scores_of(events, 3)
    for number in (1, 2, 3):
        assert ([], "length") == (completion_of(events, number), ending_of(events, number))


def test_a_scored_prompt_reuses_nothing_and_may_be_reused(llama: Any):
    """Positions in the KV cache have no logits; those that it leaves there serve others as any."""
    runner = runner_for(llama)
    submit(runner, LONG, 1, max_tokens=1)
    run(runner)
    submit(runner, LONG, 2, max_tokens=1, prompt_logprobs=0)
    events = run(runner)
    assert 0 == events[0].cached_tokens
    assert_right(scores_of(events, 2), LONG, reference(llama, LONG))
    submit(runner, LONG, 3, max_tokens=1)
    assert len(LONG) - 1 == run(runner)[0].cached_tokens


def test_a_prompt_does_not_wait_for_another_that_it_cannot_reuse(llama: Any):
    """Two equal ones are scored side by side."""
    runner, events = runner_for(llama), list[TokenEvent]()
    submit(runner, LONG, 1, max_tokens=1, prompt_logprobs=0)
    submit(runner, LONG, 2, max_tokens=1, prompt_logprobs=0)
    runner.step(events.extend)
    assert [1, 2] == [event.id for event in events if event == TokenEvent(event.id)]


def test_a_preempted_prompt_is_scored_once(llama: Any, monkeypatch: pytest.MonkeyPatch):
    """Another tenant takes its slot halfway; each token has its score once, and the right one."""
    monkeypatch.setattr(StepTimeModel, "MAX_PREFILL_TOKENS", 16)
    runner, events = runner_for(llama, slots=2), list[TokenEvent]()
    submit(runner, LONG[::-1], 1, tenant="a", max_tokens=4, prompt_logprobs=1)
    submit(runner, LONG, 2, tenant="a", max_tokens=4, prompt_logprobs=1)
    while not scores_of(events, 2):
        runner.step(events.extend)
    submit(runner, PROMPTS[3], 3, tenant="b")
    before = len(scores_of(events, 2))
    runner.step(events.extend)
    assert before == len(scores_of(events, 2)) < len(LONG) - 1
    events += run(runner)
    for number, prompt in ((1, LONG[::-1]), (2, LONG)):
        assert_right(scores_of(events, number), prompt, reference(llama, prompt))
        assert 4 == len(completion_of(events, number))


def test_scores_that_are_not_finite_end_the_request():
    """A number for them would be an invention; the request beside it goes on."""
    model, poison = make(FAMILIES["llama"]), 96
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        runner = runner_for(model, slots=2)
        model.model.embed_tokens.weight[poison] = float("nan")
    submit(runner, [1, 2, poison, 2, 3], 1, max_tokens=0, prompt_logprobs=0)
    submit(runner, PROMPTS[2], 2, max_tokens=0, prompt_logprobs=0)
    events = run(runner)
    assert "not finite" in (ending_of(events, 1) or "")
    assert [] == scores_of(events, 1)
    assert len(PROMPTS[2]) - 1 == len(scores_of(events, 2))


def test_equals_are_ranked_as_they_are_listed():
    """A token among the listed has the rank of its place; the lowest id of equals comes first."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]] * 3, dtype=torch.bfloat16)
    first, last, other = _scored(score_tokens(logits, [1, 4, 3], 3))
    assert (1, 3, 4) == (first.rank, last.rank, other.rank)
    assert [1, 2, 4] == [token for token, _ in first.top]
    assert isinstance(score_tokens(logits * float("inf"), [1, 4, 3], 0), SamplingFailure)


def _scored(found: list[TokenLogprob] | SamplingFailure) -> list[TokenLogprob]:
    assert isinstance(found, list)
    return found


def test_a_scored_token_counts_as_long_as_it_takes():
    """So that a step with scored prompts takes no longer than one with others; learnt from the steps that held some."""
    steps = StepTimeModel()
    assert StepTimeModel.INITIAL_SCORED_COST == steps.scored_token_cost
    for tokens in (1, 20, 5, 40, 8):
        steps.observe(tokens, 0.01 + 0.001 * tokens)
    budget = steps.prefill_token_budget(4)
    for _ in range(50):
        steps.observe(20, 0.01 + 0.001 * 20 + 0.002 * 16, scored=16)
    assert steps.scored_token_cost == pytest.approx(3.0)
    assert budget == steps.prefill_token_budget(4)
    steps.observe(20, 30.0, scored=1)
    assert StepTimeModel.MAX_SCORED_COST == steps.scored_token_cost


def test_the_chunk_of_a_scored_prompt_is_shorter():
    """By as much as its tokens take longer, and no longer than there is memory; other prompts take what is left."""
    scheduler = Scheduler(3)
    for number, scored in ((1, 0), (2, 0), (3, None)):
        ids = [number, *LONG]
        scheduler.add(schedule.Sequence(number, "", ids, len(ids), scored_tokens=scored))

    limited = scheduler.schedule(prefill_tokens=50, scoring=ScoringBudget(12, 4.0)).tokens
    dear = scheduler.schedule(prefill_tokens=40, scoring=ScoringBudget(1000, 4.0)).tokens

    assert [(1, 12)] == [(each.sequence.request_id, each.count) for each in limited]
    assert [(1, 10)] == [(each.sequence.request_id, each.count) for each in dear]
    cheap = scheduler.schedule(prefill_tokens=90, scoring=ScoringBudget(12, 2.0)).tokens
    assert [(1, 12), (3, 61)] == [(each.sequence.request_id, each.count) for each in cheap]


def test_the_end_token_has_a_log_probability_where_the_prompt_has(llama: Any):
    """And none where only the completion is reported."""
    end = complete(runner_for(llama), PROMPTS[2])[0]
    runner = runner_for(llama, end_ids=(end,))
    submit(runner, PROMPTS[2], 1, logprobs=0, prompt_logprobs=0)
    submit(runner, PROMPTS[2], 2, logprobs=0)
    events = run(runner)

    listed = {number: [each for event in events if event.id == number for each in event.logprobs] for number in (1, 2)}
    assert [end] == [each.token_id for each in listed[1]]
    assert [] == listed[2]
    assert ("stop", "stop") == (ending_of(events, 1), ending_of(events, 2))
