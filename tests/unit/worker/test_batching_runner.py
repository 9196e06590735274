"""The batching runner: a completion is what the model itself generates, whatever else is in the batch."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from transformers import AutoModelForCausalLM

from app.ipc.messages import Compile, Compiled, Submit, TokenEvent
from app.types import BACKGROUND_PRIORITY, SamplingParams
from app.worker.execution.base import Executor, UnsupportedModelError
from app.worker.execution.executor_selection import select_executor
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import PackedBatch, Segment
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.scheduling.batching_runner import BatchingRunner
from tests.examples import examples
from tests.unit.worker.families import CONTEXT, FAMILIES, NOT_BATCHABLE, VOCABULARY, loaded, make

NEW = 24
PROMPTS = [[(7 * n + 3 * i) % VOCABULARY for i in range(length)] for n, length in enumerate((1, 5, 12, 30))]


@pytest.fixture(scope="module")
def llama() -> Any:
    return make(FAMILIES["llama"])


def runner_for(
    model: Any,
    slots: int = 4,
    *,
    reuse: bool = True,
    end_ids: tuple[int, ...] = (),
    compiled: Compile | None = None,
    prefix_cache_bytes: int = 0,
    speculation: bool = False,
) -> BatchingRunner:
    """Args: compiled: the setting that selects an executor; None leaves all to the torch way."""
    model_runner = create_torch_runner(model, length=CONTEXT, slots=slots, free_bytes=10**9)
    if compiled is not None:
        select_executor(model_runner, compiled)
    return BatchingRunner(
        replace(loaded(model), end_ids=end_ids),
        model_runner,
        prefix_reuse=reuse,
        prefix_cache_bytes=prefix_cache_bytes,
        speculation=speculation,
    )


def run(runner: BatchingRunner) -> list[TokenEvent]:
    """Step until nothing is left to do."""
    events: list[TokenEvent] = []
    while runner.busy:
        runner.step(events.extend)
    return events


def completion_of(events: Sequence[TokenEvent], number: int) -> list[int]:
    return [token for event in events if event.id == number for token in event.token_ids]


def ending_of(events: Sequence[TokenEvent], number: int) -> str | None:
    return next(event.finish or event.error for event in events if event.id == number and (event.finish or event.error))


def submit(runner: BatchingRunner, prompt: Sequence[int], number: int = 1, tenant: str = "", **settings: Any) -> None:
    runner.submit(Submit(number, tuple(prompt), SamplingParams(**{"max_tokens": NEW, **settings}), tenant))


def complete(runner: BatchingRunner, prompt: Sequence[int], **settings: Any) -> list[int]:
    submit(runner, prompt, **settings)
    return completion_of(run(runner), 1)


@torch.inference_mode()
def generate(model: Any, prompt: Sequence[int]) -> list[int]:
    """Return what transformers' own `generate` decodes greedily."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return [int(token) for token in whole[0, len(prompt) :]]


@pytest.mark.parametrize(
    ("family", "compiled"),
    [
        *(pytest.param(family, "auto", id=f"{family}-auto") for family in FAMILIES),
        *(
            pytest.param(family, None, id=f"{family}-torch", marks=[] if family == "llama" else pytest.mark.soak)
            for family in FAMILIES
        ),
    ],
)
def test_greedy_completions_are_those_of_generate(family: str, compiled: Compile | None):
    """Token for token in float32, one by one and in a full batch whose requests start at different times."""
    build = FAMILIES[family]
    model = make(build)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    single = runner_for(make(build), slots=1, compiled=compiled)
    assert expected == [complete(single, prompt) for prompt in PROMPTS]

    runner, events = runner_for(make(build), slots=3, compiled=compiled), list[TokenEvent]()
    for number, prompt in enumerate(PROMPTS):
        submit(runner, prompt, number)
        runner.step(events.extend)
        runner.step(events.extend)
    events += run(runner)
    assert expected == [completion_of(events, number) for number in range(len(PROMPTS))]
    assert len({tuple(completion) for completion in expected}) == len(expected)


@pytest.mark.parametrize("name", NOT_BATCHABLE)
def test_a_model_that_cannot_be_batched_is_recognised_and_left_as_it_was(name: str):
    """The reason is said, and an ordinary forward pass gives what it gave before."""
    build, reason = NOT_BATCHABLE[name]
    model, ids = make(build), torch.tensor([PROMPTS[2]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        with pytest.raises(UnsupportedModelError, match=reason):
            create_torch_runner(model, length=CONTEXT, slots=2, free_bytes=10**9)
        assert torch.equal(before, model(input_ids=ids).logits)


def test_a_model_whose_logits_differ_in_a_packed_batch_is_recognised(llama: Any):
    """Here its last layer looks at how many tokens a pass holds, as no configuration says."""
    model = make(FAMILIES["llama"])
    model.model.norm.register_forward_hook(lambda module, inputs, out: out + out.mean(dim=1, keepdim=True))
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        create_torch_runner(model, length=CONTEXT, slots=2, free_bytes=10**9)


@pytest.mark.parametrize(("free_bytes", "slots", "expected"), [(10**12, None, 32), (10**12, 5, 5), (1, 5, 1)])
def test_there_are_as_many_slots_as_requested_and_fit(llama: Any, free_bytes: int, slots: int | None, expected: int):
    """One at least: a model that is loaded serves."""
    assert expected == create_torch_runner(llama, length=CONTEXT, slots=slots, free_bytes=free_bytes).cache.slots


def test_prefix_reuse_changes_no_completion(llama: Any):
    """Conversations that continue their own completions are the same with reuse and without, and reuse happens."""
    completions = []
    for reuse in (True, False):
        runner, prompt, reused = runner_for(llama, reuse=reuse), list(PROMPTS[1]), 0
        for turn in range(3):
            submit(runner, prompt, turn, max_tokens=8)
            events = run(runner)
            reused += events[0].cached_tokens
            prompt += [*completion_of(events, turn), turn]
        completions.append(prompt)
        assert reuse == (reused > 0)
    assert completions[0] == completions[1]


@pytest.mark.parametrize("compiled", [None, "auto"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_prefix_cache_changes_no_completion(family: str, compiled: Compile | None):
    """Conversations that take turns in one slot start where they ended and complete the same."""
    model = make(FAMILIES[family])
    runner = runner_for(model, slots=1, compiled=compiled, prefix_cache_bytes=10**6)
    single = runner_for(make(FAMILIES[family]), slots=1, reuse=False)
    conversations = {n: [(5 * n + 3 * i) % VOCABULARY for i in range(20)] for n in range(3)}
    for turn in range(3):
        for number, tokens in conversations.items():
            request = 10 * turn + number
            submit(runner, tokens, request, max_tokens=6)
            events = run(runner)
            assert events[0].cached_tokens == bool(turn) * (len(tokens) - 2)
            completion = completion_of(events, request)
            assert completion == complete(single, tokens, max_tokens=6)
            tokens += [*completion, turn]


REPETITIVE = [*range(10, 20), *range(10, 20), *range(10, 16)]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.3, "seed": 5, "logprobs": 2},
    {"temperature": 1.0, "seed": 6, "top_p": 0.9, "top_k": 20},
    {"temperature": 0.0, "repetition_penalty": 1.3, "min_tokens": 20},
]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_speculation_changes_no_token_and_no_logprob(family: str):
    """Whatever the settings, beside one another."""
    found = []
    for speculation in (False, True):
        runner = runner_for(make(FAMILIES[family]), end_ids=(3,), speculation=speculation)
        for number, settings_ in enumerate(SETTINGS):
            submit(runner, REPETITIVE, number, max_tokens=30, **settings_)
        events = run(runner)
        completions = [completion_of(events, number) for number in range(len(SETTINGS))]
        logprobs = [each.logprob for event in events if event.id == 1 for each in event.logprobs]
        endings = [ending_of(events, number) for number in range(len(SETTINGS))]
        found.append((completions, endings, logprobs))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-4)


def test_a_request_for_no_token_has_no_guess(llama: Any):
    """Also where its prompt is in the KV cache but for the last token, and repeats itself."""
    runner = runner_for(llama, speculation=True)
    for number in range(2):
        submit(runner, REPETITIVE, number, max_tokens=0)
        assert "length" == ending_of(run(runner), number)


def test_text_that_repeats_takes_fewer_steps_with_speculation(llama: Any):
    """The greedy completion of this model comes back to what it said before."""
    runner, events, steps = runner_for(llama, speculation=True), list[TokenEvent](), 0
    submit(runner, REPETITIVE, 1, max_tokens=30)
    while runner.busy:
        runner.step(events.extend)
        steps += 1
    assert 30 == len(completion_of(events, 1))
    assert steps < 22


def test_guesses_end_where_the_completion_does(llama: Any):
    """At its last token, at its stop token, and at the end of the KV cache."""
    most = CONTEXT - len(REPETITIVE)
    expected = complete(runner_for(llama), REPETITIVE, max_tokens=most)
    for tokens in (1, 2, 5, most):
        guessed = complete(runner_for(llama, speculation=True), REPETITIVE, max_tokens=tokens)
        assert expected[:tokens] == guessed
    stop = expected[4]
    plain, guessing = (runner_for(llama, end_ids=(stop,), speculation=each) for each in (False, True))
    assert complete(plain, REPETITIVE, max_tokens=30) == complete(guessing, REPETITIVE, max_tokens=30)


def test_nothing_is_reused_for_another_tenant(llama: Any):
    """The same prompt is computed again."""
    runner = runner_for(llama)
    submit(runner, PROMPTS[3], 1, tenant="a")
    run(runner)
    submit(runner, PROMPTS[3], 2, tenant="b")
    assert 0 == run(runner)[0].cached_tokens
    submit(runner, PROMPTS[3], 3, tenant="a")
    assert len(PROMPTS[3]) - 1 == run(runner)[0].cached_tokens


def test_one_seed_gives_one_completion_whoever_else_is_in_the_batch(llama: Any):
    """Alone, among others, and again; another sample of the same seed differs."""
    mine: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 7}
    expected = complete(runner_for(llama), PROMPTS[2], **mine)
    runner = runner_for(llama)
    for number in (2, 3):
        submit(runner, PROMPTS[number], number, temperature=1.5)
    submit(runner, PROMPTS[2], 1, **mine)
    submit(runner, PROMPTS[2], 4, **mine, sample=1)
    events = run(runner)
    assert expected == completion_of(events, 1)
    assert expected != completion_of(events, 4)


def test_logprobs_come_with_their_tokens(llama: Any):
    """One for each token, of that token, and greedy choices are the first of the top."""
    runner = runner_for(llama)
    submit(runner, PROMPTS[2], logprobs=2)
    events = run(runner)
    logprobs = [each for event in events for each in event.logprobs]
    assert completion_of(events, 1) == [each.token_id for each in logprobs] == [each.top[0][0] for each in logprobs]
    assert all(0 > each.top[0][1] > each.top[1][1] and each.logprob == each.top[0][1] for each in logprobs)


def test_an_end_token_ends_a_completion_and_is_not_listed(llama: Any):
    """The model's own, or one that the request names; with ignore_eos only the request's."""
    whole = complete(runner_for(llama), PROMPTS[2])
    end, later = whole[5], next(token for token in whole[6:] if token not in whole[:6])
    first = whole.index(end)
    for changes, end_ids, expected in (
        ({}, (end,), whole[:first]),
        ({"stop_token_ids": (end,)}, (), whole[:first]),
        ({"ignore_eos": True}, (end,), whole),
        ({"ignore_eos": True, "stop_token_ids": (later,)}, (end,), whole[: whole.index(later)]),
    ):
        runner = runner_for(llama, end_ids=end_ids)
        submit(runner, PROMPTS[2], 1, **changes)
        events = run(runner)
        assert (expected, "length" if expected == whole else "stop") == (completion_of(events, 1), ending_of(events, 1))


def test_cancelling_frees_the_slot_before_the_next_step(llama: Any):
    """The one that waited begins in the very next step, and the cancelled one has no more tokens."""
    runner, events = runner_for(llama, slots=1), list[TokenEvent]()
    submit(runner, PROMPTS[1], 1)
    submit(runner, PROMPTS[2], 2)
    for _ in range(3):
        runner.step(events.extend)
    runner.cancel(1)
    events.clear()
    runner.step(events.extend)
    assert [TokenEvent(1, finish="abort"), TokenEvent(2)] == events[:2]
    assert 1 == len(completion_of(events, 2))
    runner.cancel(99)


BAD = [
    (Submit(1, (), SamplingParams(max_tokens=5)), "holds no token"),
    (Submit(1, (VOCABULARY,), SamplingParams(max_tokens=5)), "outside the model's vocabulary"),
    (Submit(1, (-1,), SamplingParams(max_tokens=5)), "outside the model's vocabulary"),
    (Submit(1, (1,) * 60, SamplingParams(max_tokens=5)), "do not fit 64"),
    (Submit(1, (1,), SamplingParams(max_tokens=-1)), "do not fit 64"),
    (Submit(1, (1,), SamplingParams(max_tokens=5, stop_token_ids=(VOCABULARY,))), "outside the model's vocabulary"),
    (Submit(1, (1,), SamplingParams(max_tokens=5, logit_bias=((VOCABULARY, 1.0),))), "vocabulary"),
]


@pytest.mark.parametrize(("bad", "words"), BAD)
def test_what_would_break_a_batch_is_refused_alone(llama: Any, bad: Submit, words: str):
    """One error event; the completion beside it is what it would have been."""
    expected = complete(runner_for(llama), PROMPTS[2])
    runner = runner_for(llama)
    submit(runner, PROMPTS[2], 2)
    runner.submit(bad)
    events = run(runner)
    (refused,) = [event for event in events if event.id == 1]
    assert words in (refused.error or "")
    assert expected == completion_of(events, 2)


def test_logits_that_are_nan_end_one_request_and_leave_nothing_behind():
    """Its neighbour continues, and the next request in that slot is right."""
    model, poison = make(FAMILIES["llama"]), 96
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        expected = complete(runner_for(model), PROMPTS[2])
        runner = runner_for(model, slots=2)
        model.model.embed_tokens.weight[poison] = float("nan")
    submit(runner, [1, poison, 2], 1)
    submit(runner, PROMPTS[2], 2)
    submit(runner, PROMPTS[2], 3)
    events = run(runner)
    assert "not finite" in (ending_of(events, 1) or "")
    assert [expected, expected] == [completion_of(events, 2), completion_of(events, 3)]


def test_a_step_that_fails_ends_only_what_fails_alone(llama: Any, monkeypatch: pytest.MonkeyPatch):
    """The other requests of that step continue as if nothing had happened."""
    expected, forward = complete(runner_for(llama), PROMPTS[2]), ModelRunner.forward

    def fail_on_66(self: ModelRunner, segments: Sequence[Segment], wanted: Sequence[bool]) -> torch.Tensor:
        if any(66 in segment.token_ids for segment in segments):
            raise MemoryError
        return forward(self, segments, wanted)

    runner = runner_for(llama)
    monkeypatch.setattr(ModelRunner, "forward", fail_on_66)
    submit(runner, PROMPTS[2], 1)
    submit(runner, [1, 66], 2)
    events = run(runner)
    assert "out of memory" in (ending_of(events, 2) or "")
    assert expected == completion_of(events, 1)


class Scarce:
    """An executor with memory for few tokens at once."""

    compiled: Compiled | None = None

    def __init__(self, inner: Executor, tokens: int, error: Exception) -> None:
        self.forget_adapter = inner.forget_adapter
        self._inner = inner
        self._tokens = tokens
        self._error = error

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        if batch.size > self._tokens:
            raise self._error
        return self._inner.forward(batch)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "a library", "the driver", "the host"])
def test_a_step_that_there_is_no_memory_for_is_computed_in_smaller_ones(llama: Any, error: Exception):
    """Prompts in pieces, and fewer sequences at once; nobody's completion changes."""
    expected = [complete(runner_for(llama), prompt) for prompt in PROMPTS]
    model_runner = create_torch_runner(llama, length=CONTEXT, slots=4, free_bytes=10**9)
    model_runner.executor = Scarce(model_runner.executor, 16, error)
    runner = BatchingRunner(loaded(llama), model_runner)

    for number, prompt in enumerate([*PROMPTS, PROMPTS[3][::-1]]):
        submit(runner, prompt, number)
    events = run(runner)

    assert expected == [completion_of(events, number) for number in range(4)]
    assert ["length"] * 5 == [ending_of(events, number) for number in range(5)]


def test_a_prompt_that_there_is_no_memory_for_ends_alone(llama: Any):
    """Its error says why; those that decode beside it go on, and the next ones are served."""
    expected = complete(runner_for(llama), PROMPTS[1])
    model_runner = create_torch_runner(llama, length=CONTEXT, slots=4, free_bytes=10**9)
    model_runner.executor = Scarce(model_runner.executor, 6, OUT_OF_MEMORY[0])
    runner = BatchingRunner(loaded(llama), model_runner)

    submit(runner, PROMPTS[1], 1)
    runner.step(lambda events: None)
    submit(runner, PROMPTS[3], 2)
    events = run(runner)
    submit(runner, PROMPTS[1], 3)
    events += run(runner)

    assert "out of memory" in (ending_of(events, 2) or "")
    assert "length" == ending_of(events, 1)
    assert expected == completion_of(events, 3)


def test_a_failing_device_is_not_survived(llama: Any, monkeypatch: pytest.MonkeyPatch):
    """The process has to go: its device is in an unknown state."""
    runner = runner_for(llama)
    submit(runner, PROMPTS[2])

    def break_down(self: ModelRunner, segments: Sequence[Segment], wanted: Sequence[bool]) -> torch.Tensor:
        raise torch.AcceleratorError("device-side assert")

    monkeypatch.setattr(ModelRunner, "forward", break_down)
    with pytest.raises(torch.AcceleratorError):
        run(runner)


class AnyOrder(RuleBasedStateMachine):
    """Every request has exactly one last event and nothing after it, and every completion is the right one."""

    model = make(FAMILIES["llama"])
    prompts: dict[int, tuple[list[int], int]]

    def __init__(self) -> None:
        super().__init__()
        self.runner = runner_for(self.model, slots=2)
        self.lone = runner_for(self.model, slots=1, reuse=False)
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
        submit(self.runner, prompt, number, tenant, max_tokens=tokens)

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
            completion, ending = completion_of(self.events, number), ending_of(self.events, number)
            expected = complete(self.lone, prompt, max_tokens=tokens) if prompt else []
            assert completion == (expected[: len(completion)] if number in self.cancelled else expected)
            assert ending in ("length", "abort") or not prompt


AnyOrder.TestCase.settings = examples(25, stateful_step_count=25)
test_any_order = AnyOrder.TestCase


@pytest.mark.soak
def test_a_request_beside_the_background_takes_little_longer():
    """At most 1.3 times the processor time of the steps that it takes without it, with eight lines of batches."""
    model = AutoModelForCausalLM.from_pretrained("models/tiny-chat", dtype=torch.float32).eval()
    model_runner = create_torch_runner(model, length=512, slots=16, free_bytes=10**9)
    facts = replace(loaded(model), vocab_size=model.config.vocab_size, context_length=512)
    runner, numbers = BatchingRunner(facts, model_runner, prefix_reuse=True), count(1)

    def add(tokens: int, new: int, tenant: str, priority: int) -> int:
        number = next(numbers)
        prompt = tuple((7 * number + 3 * n) % 200 + 5 for n in range(tokens))
        runner.submit(Submit(number, prompt, SamplingParams(max_tokens=new), tenant, priority=priority))
        return number

    def seconds() -> float:
        live, events, began = add(40, 48, "a", 0), list[TokenEvent](), time.thread_time()
        while not any(event.id == live and event.finish for event in events):
            runner.step(events.extend)
        return time.thread_time() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that this thread's time is all of it
    try:
        taken: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(6):
            taken[False] += [seconds() for _ in range(4)]
            lines = [add(60 + 10 * n, 300, "batch a", BACKGROUND_PRIORITY) for n in range(8)]
            for _ in range(20):
                runner.step(lambda events: None)
            taken[True] += [seconds() for _ in range(4)]
            for line in lines:
                runner.cancel(line)
            runner.step(lambda events: None)
    finally:
        torch.set_num_threads(threads)
    assert median(taken[True]) <= 1.3 * median(taken[False])
