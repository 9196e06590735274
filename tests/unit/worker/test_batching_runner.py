"""The batching runner: what it answers is what the model answers, whoever else is being answered."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.ipc.messages import Compile, Submit, TokenEvent
from app.types import SamplingParams
from app.worker.execution.executor_selection import accelerate
from app.worker.execution.model_runner import RowModel, UnsupportedModelError, make_row_model
from app.worker.execution.packed_batch import Piece
from app.worker.scheduling.batching_runner import BatchingRunner, Pace
from app.worker.scheduling.schedule import Sequence as Answer
from app.worker.scheduling.schedule import Work
from tests.unit.worker.families import CONTEXT, FAMILIES, NOT_IN_ROWS, VOCABULARY, loaded, make

NEW = 24
PROMPTS = [[(7 * n + 3 * i) % VOCABULARY for i in range(length)] for n, length in enumerate((1, 5, 12, 30))]


@pytest.fixture(scope="module")
def llama() -> Any:
    return make(FAMILIES["llama"])


def runner_for(
    model: Any, rows: int = 4, *, reuse: bool = True, end_ids: tuple[int, ...] = (), compiled: Compile | None = None
) -> BatchingRunner:
    """Args: compiled: what is made faster, and how; None leaves all as transformers made it."""
    in_rows = make_row_model(model, length=CONTEXT, rows=rows, free_bytes=10**9)
    if compiled is not None:
        accelerate(in_rows, compiled)
    return BatchingRunner(replace(loaded(model), end_ids=end_ids), in_rows, reuse=reuse)


def run(runner: BatchingRunner) -> list[TokenEvent]:
    """Step until nothing is left to do."""
    events: list[TokenEvent] = []
    while runner.busy:
        runner.step(events.extend)
    return events


def answer_of(events: Sequence[TokenEvent], number: int) -> list[int]:
    return [token for event in events if event.id == number for token in event.token_ids]


def ending_of(events: Sequence[TokenEvent], number: int) -> str | None:
    return next(event.finish or event.error for event in events if event.id == number and (event.finish or event.error))


def ask(runner: BatchingRunner, prompt: Sequence[int], number: int = 1, tenant: str = "", **settings: Any) -> None:
    runner.submit(Submit(number, tuple(prompt), SamplingParams(**{"max_tokens": NEW, **settings}), tenant))


def complete(runner: BatchingRunner, prompt: Sequence[int], **settings: Any) -> list[int]:
    ask(runner, prompt, **settings)
    return answer_of(run(runner), 1)


@torch.inference_mode()
def generate(model: Any, prompt: Sequence[int]) -> list[int]:
    """What transformers' own `generate` answers, greedily."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return [int(token) for token in whole[0, len(prompt) :]]


@pytest.mark.parametrize("compiled", [None, "auto"], ids=["torch's", "compiled if it can be"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(family: str, compiled: Compile | None):
    """Token for token in float32, alone and in a full batch whose answers begin at different times."""
    build = FAMILIES[family]
    model = make(build)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    alone = runner_for(make(build), rows=1, compiled=compiled)
    assert expected == [complete(alone, prompt) for prompt in PROMPTS]

    runner, events = runner_for(make(build), rows=3, compiled=compiled), list[TokenEvent]()
    for number, prompt in enumerate(PROMPTS):
        ask(runner, prompt, number)
        runner.step(events.extend)
        runner.step(events.extend)
    events += run(runner)
    assert expected == [answer_of(events, number) for number in range(len(PROMPTS))]
    assert len({tuple(answer) for answer in expected}) == len(expected)


@pytest.mark.parametrize("name", NOT_IN_ROWS)
def test_a_model_that_cannot_be_batched_is_recognised_and_left_as_it_was(name: str):
    """The reason is said, and an ordinary forward pass gives what it gave before."""
    build, reason = NOT_IN_ROWS[name]
    model, ids = make(build), torch.tensor([PROMPTS[2]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        with pytest.raises(UnsupportedModelError, match=reason):
            make_row_model(model, length=CONTEXT, rows=2, free_bytes=10**9)
        assert torch.equal(before, model(input_ids=ids).logits)


def test_a_model_whose_scores_differ_in_rows_is_recognised(llama: Any):
    """Here its last layer looks at how many tokens a pass holds, as no configuration says."""
    model = make(FAMILIES["llama"])
    model.model.norm.register_forward_hook(lambda module, inputs, out: out + out.mean(dim=1, keepdim=True))
    with pytest.raises(UnsupportedModelError, match="scores differ"):
        make_row_model(model, length=CONTEXT, rows=2, free_bytes=10**9)


@pytest.mark.parametrize(("free_bytes", "rows", "expected"), [(10**12, None, 32), (10**12, 5, 5), (1, 5, 1)])
def test_there_are_as_many_rows_as_asked_for_and_fit(llama: Any, free_bytes: int, rows: int | None, expected: int):
    """One at least: a model that is loaded serves."""
    assert expected == make_row_model(llama, length=CONTEXT, rows=rows, free_bytes=free_bytes).cache.rows


def test_reuse_changes_no_answer(llama: Any):
    """Conversations that go on from their own answers are the same with reuse and without, and reuse happens."""
    answers = []
    for reuse in (True, False):
        runner, prompt, reused = runner_for(llama, reuse=reuse), list(PROMPTS[1]), 0
        for turn in range(3):
            ask(runner, prompt, turn, max_tokens=8)
            events = run(runner)
            reused += events[0].cached_tokens
            prompt += [*answer_of(events, turn), turn]
        answers.append(prompt)
        assert reuse == (reused > 0)
    assert answers[0] == answers[1]


def test_nothing_is_reused_for_another_tenant(llama: Any):
    """The same prompt is computed again."""
    runner = runner_for(llama)
    ask(runner, PROMPTS[3], 1, tenant="a")
    run(runner)
    ask(runner, PROMPTS[3], 2, tenant="b")
    assert 0 == run(runner)[0].cached_tokens
    ask(runner, PROMPTS[3], 3, tenant="a")
    assert len(PROMPTS[3]) - 1 == run(runner)[0].cached_tokens


def test_one_seed_gives_one_answer_whoever_else_is_in_the_batch(llama: Any):
    """Alone, among others, and again; another sample of the same seed differs."""
    mine = {"temperature": 1.0, "top_p": 0.95, "seed": 7}
    expected = complete(runner_for(llama), PROMPTS[2], **mine)
    runner = runner_for(llama)
    for number in (2, 3):
        ask(runner, PROMPTS[number], number, temperature=1.5)
    ask(runner, PROMPTS[2], 1, **mine)
    ask(runner, PROMPTS[2], 4, **mine, sample=1)
    events = run(runner)
    assert expected == answer_of(events, 1)
    assert expected != answer_of(events, 4)


def test_logprobs_come_with_their_tokens(llama: Any):
    """One for each token, of that token, and greedy choices are the first of the top."""
    runner = runner_for(llama)
    ask(runner, PROMPTS[2], logprobs=2)
    events = run(runner)
    logprobs = [each for event in events for each in event.logprobs]
    assert answer_of(events, 1) == [each.token_id for each in logprobs] == [each.top[0][0] for each in logprobs]
    assert all(0 > each.top[0][1] > each.top[1][1] and each.logprob == each.top[0][1] for each in logprobs)


def test_an_end_token_ends_an_answer_and_is_not_listed(llama: Any):
    """The model's own, or one that the request names; with ignore_eos only the request's."""
    whole = complete(runner_for(llama), PROMPTS[2])
    end, later = whole[5], next(token for token in whole[6:] if token not in whole[:6])
    first = whole.index(end)
    for asked, end_ids, expected in (
        ({}, (end,), whole[:first]),
        ({"stop_token_ids": (end,)}, (), whole[:first]),
        ({"ignore_eos": True}, (end,), whole),
        ({"ignore_eos": True, "stop_token_ids": (later,)}, (end,), whole[: whole.index(later)]),
    ):
        runner = runner_for(llama, end_ids=end_ids)
        ask(runner, PROMPTS[2], 1, **asked)
        events = run(runner)
        assert (expected, "length" if expected == whole else "stop") == (answer_of(events, 1), ending_of(events, 1))


def test_cancelling_frees_the_row_before_the_next_step(llama: Any):
    """The one that waited begins in the very next step, and the cancelled one has no more tokens."""
    runner, events = runner_for(llama, rows=1), list[TokenEvent]()
    ask(runner, PROMPTS[1], 1)
    ask(runner, PROMPTS[2], 2)
    for _ in range(3):
        runner.step(events.extend)
    runner.cancel(1)
    events.clear()
    runner.step(events.extend)
    assert [TokenEvent(1, finish="abort"), TokenEvent(2)] == events[:2]
    assert 1 == len(answer_of(events, 2))
    runner.cancel(99)


BAD = [
    (Submit(1, (), SamplingParams(max_tokens=5)), "holds no token"),
    (Submit(1, (VOCABULARY,), SamplingParams(max_tokens=5)), "outside the model's vocabulary"),
    (Submit(1, (-1,), SamplingParams(max_tokens=5)), "outside the model's vocabulary"),
    (Submit(1, (1,) * 60, SamplingParams(max_tokens=5)), "do not fit 64"),
    (Submit(1, (1,), SamplingParams(max_tokens=0)), "do not fit 64"),
    (Submit(1, (1,), SamplingParams(max_tokens=5, stop_token_ids=(VOCABULARY,))), "outside the model's vocabulary"),
    (Submit(1, (1,), SamplingParams(max_tokens=5, logit_bias=((VOCABULARY, 1.0),))), "vocabulary"),
]


@pytest.mark.parametrize(("bad", "words"), BAD)
def test_what_would_break_a_batch_is_refused_alone(llama: Any, bad: Submit, words: str):
    """One error event; the answer beside it is what it would have been."""
    expected = complete(runner_for(llama), PROMPTS[2])
    runner = runner_for(llama)
    ask(runner, PROMPTS[2], 2)
    runner.submit(bad)
    events = run(runner)
    (refused,) = [event for event in events if event.id == 1]
    assert words in (refused.error or "")
    assert expected == answer_of(events, 2)


def test_scores_that_are_no_numbers_end_one_row_and_leave_nothing_behind():
    """Its neighbour goes on, and the next request in that row is right."""
    model, poison = make(FAMILIES["llama"]), 96
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        expected = complete(runner_for(model), PROMPTS[2])
        runner = runner_for(model, rows=2)
        model.model.embed_tokens.weight[poison] = float("nan")
    ask(runner, [1, poison, 2], 1)
    ask(runner, PROMPTS[2], 2)
    ask(runner, PROMPTS[2], 3)
    events = run(runner)
    assert "not finite" in (ending_of(events, 1) or "")
    assert [expected, expected] == [answer_of(events, 2), answer_of(events, 3)]


def test_a_step_that_fails_ends_only_what_fails_alone(llama: Any, monkeypatch: pytest.MonkeyPatch):
    """The other requests of that step go on as if nothing had happened."""
    expected, scores = complete(runner_for(llama), PROMPTS[2]), RowModel.scores

    def fail_on_66(self: RowModel, pieces: Sequence[Piece], wanted: Sequence[bool]) -> torch.Tensor:
        if any(66 in piece.tokens for piece in pieces):
            raise MemoryError
        return scores(self, pieces, wanted)

    runner = runner_for(llama)
    monkeypatch.setattr(RowModel, "scores", fail_on_66)
    ask(runner, PROMPTS[2], 1)
    ask(runner, [1, 66], 2)
    events = run(runner)
    assert "out of memory" in (ending_of(events, 2) or "")
    assert expected == answer_of(events, 1)


def test_a_failing_device_is_not_survived(llama: Any, monkeypatch: pytest.MonkeyPatch):
    """The process has to go: its device is in an unknown state."""
    runner = runner_for(llama)
    ask(runner, PROMPTS[2])

    def break_down(self: RowModel, pieces: Sequence[Piece], wanted: Sequence[bool]) -> torch.Tensor:
        raise torch.AcceleratorError("device-side assert")

    monkeypatch.setattr(RowModel, "scores", break_down)
    with pytest.raises(torch.AcceleratorError):
        run(runner)


def _work(*counts: int) -> list[Work]:
    return [Work(Answer(n, "", [0] * count, count), count) for n, count in enumerate(counts)]


def _measured() -> Pace:
    """A step of one token takes 29 ms, and each token more another one."""
    pace = Pace()
    for _ in range(50):
        pace.see(_work(1, 1), 0.030)
        pace.see(_work(1, 1, 100), 0.130)
    return pace


def test_the_pace_holds_prompts_to_what_streams_can_bear():
    """All that fits while nobody streams; beside a stream so much that a step takes four fifths longer."""
    pace = _measured()
    assert (Pace.MOST, Pace.FIRST) == (Pace().prompt_tokens(ready=0), Pace().prompt_tokens(ready=1))
    assert (Pace.MOST, 23, 39) == tuple(pace.prompt_tokens(ready) for ready in (0, 1, 21))
    for _ in range(50):
        pace.see(_work(1, 100), 9.0)
        pace.see(_work(1), 0.01)
    assert Pace.LEAST == pace.prompt_tokens(ready=1)


def test_the_more_prompts_wait_the_more_of_a_step_they_get():
    """As many times more as there are, up to a bound."""
    pace = _measured()
    assert [23, 23, 46, 92, 92] == [pace.prompt_tokens(1, starting) for starting in (0, 1, 2, 4, 30)]


class AnyOrder(RuleBasedStateMachine):
    """Every request has exactly one last event and nothing after it, and every answer is the right one."""

    model = make(FAMILIES["llama"])
    prompts: dict[int, tuple[list[int], int]]

    def __init__(self) -> None:
        super().__init__()
        self.runner = runner_for(self.model, rows=2)
        self.lone = runner_for(self.model, rows=1, reuse=False)
        self.prompts = {}
        self.events: list[TokenEvent] = []
        self.cancelled: set[int] = set()

    @rule(
        prompt=st.lists(st.integers(0, VOCABULARY - 1), max_size=40),
        tokens=st.integers(1, 6),
        tenant=st.sampled_from("ab"),
    )
    def submit(self, prompt: list[int], tokens: int, tenant: str) -> None:
        number = len(self.prompts)
        self.prompts[number] = prompt, tokens
        ask(self.runner, prompt, number, tenant, max_tokens=tokens)

    @rule(data=st.data())
    @precondition(lambda self: self.prompts)
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.prompts)))
        self.cancelled.add(number)
        self.runner.cancel(number)

    @rule()
    def step(self) -> None:
        self.runner.step(self.events.extend)

    @invariant()
    def nothing_follows_a_last_event(self) -> None:
        over: set[int] = set()
        for event in self.events:
            assert event.id not in over
            if event.finish or event.error:
                over.add(event.id)

    def teardown(self) -> None:
        self.events += run(self.runner)
        self.nothing_follows_a_last_event()
        for number, (prompt, tokens) in self.prompts.items():
            answer, ending = answer_of(self.events, number), ending_of(self.events, number)
            expected = complete(self.lone, prompt, max_tokens=tokens) if prompt else []
            assert answer == (expected[: len(answer)] if number in self.cancelled else expected)
            assert ending in ("length", "abort") or not prompt


AnyOrder.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
test_any_order = AnyOrder.TestCase
