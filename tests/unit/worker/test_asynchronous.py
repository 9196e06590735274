"""Launching a step before the last one's tokens are read changes nothing of what anybody gets.

Without a GPU a step is computed while it is launched; what the runner knows of it is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.ipc.messages import Submit, TokenEvent
from app.types import BACKGROUND_PRIORITY, SamplingParams
from app.worker.execution.graphs.graph_executor import GraphExecutor
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import Segment, StaticBatch
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.sampling import device_sampler, sampler
from app.worker.sampling.device_sampler import DeviceSampler, DeviceTokens
from app.worker.sampling.generation_rules import GenerationRules
from app.worker.scheduling.batching_runner import BatchingRunner
from tests.examples import examples
from tests.unit.worker.families import CONTEXT, FAMILIES, loaded, make
from tests.unit.worker.lora_adapters import read, save_adapter
from tests.unit.worker.test_batching_runner import (
    NEW,
    OUT_OF_MEMORY,
    PROMPTS,
    Scarce,
    completion_of,
    ending_of,
    run,
    submit,
)
from tests.unit.worker.test_graphs import called, with_graphs

MODEL = make(FAMILIES["llama"])
END = 3
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "min_tokens": 8},
    {"temperature": 1.0, "seed": 5, "logprobs": 2},
    {"temperature": 1.2, "seed": 6, "top_p": 0.9, "top_k": 20},
    {"temperature": 1.0, "seed": 7, "top_p": 0.8, "frequency_penalty": 0.5},
    {"temperature": 1.5, "seed": 8, "min_p": 0.02, "logit_bias": ((4, 3.0),)},
    {"temperature": 1.0, "seed": 9, "stop_token_ids": (11, 12, 13, 14)},
    {"temperature": 1.0, "seed": 1, "prompt_logprobs": 1},
    {"temperature": 0.0, "max_tokens": 0},
    {"temperature": 2.0, "seed": 2, "ignore_eos": True},
]
REQUEST = st.fixed_dictionaries(
    {
        "prompt": st.integers(0, len(PROMPTS) - 1),
        "settings": st.integers(0, len(SETTINGS) - 1),
        "tokens": st.integers(1, 20),
        "tenant": st.sampled_from("ab"),
        "priority": st.sampled_from([0, 0, 0, BACKGROUND_PRIORITY]),
        "wait": st.integers(0, 4),
        "cancel_after": st.sampled_from([None, None, None, 0, 3, 6]),
    }
)


@pytest.fixture(scope="module", autouse=True)
def few_sorted() -> Iterator[None]:
    """Let some rows need more of the most likely tokens than were sorted, in this small vocabulary, too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (sampler, device_sampler):
            patch.setattr(module, "TOPK_WIDTHS", (4, 30))
        yield


def runner_for(*, asynchronous: bool, slots: int = 3, graphs: bool = False, **facts: Any) -> BatchingRunner:
    """Args: graphs: whether passes, and steps of sampling, are those that a GPU captures."""
    model_runner = create_torch_runner(MODEL, length=CONTEXT, slots=slots, free_bytes=10**9)
    device_sampler = DeviceSampler(model_runner.cache.slots, model_runner.vocab_size, "cpu")
    if graphs:
        with_graphs(model_runner, pass_keys=100)
        device_sampler.record(called)
    facts = {"end_ids": (END,)} | facts
    return BatchingRunner(
        replace(loaded(MODEL), **facts), model_runner, asynchronous=asynchronous, device_sampler=device_sampler
    )


def serve(runner: BatchingRunner, requests: Sequence[dict[str, Any]]) -> list[TokenEvent]:
    """Submit requests with so many steps between them, cancel some, and step until all have ended."""
    events, cancels = list[TokenEvent](), list[tuple[int, int]]()
    step = 0

    def advance() -> None:
        nonlocal step
        for due, number in cancels:
            if due == step:
                runner.cancel(number)
        runner.step(events.extend)
        step += 1

    for number, request in enumerate(requests):
        for _ in range(request["wait"]):
            advance()
        settings = {"max_tokens": request["tokens"], **SETTINGS[request["settings"]]}
        params = SamplingParams(**{"max_tokens": NEW, "temperature": 0.0} | settings)
        priority, tenant = request["priority"], request["tenant"]
        runner.submit(Submit(number, tuple(PROMPTS[request["prompt"]]), params, tenant, priority=priority))
        if request["cancel_after"] is not None:
            cancels.append((step + request["cancel_after"], number))
    while runner.busy:
        advance()
    return events


def summary_of(events: Sequence[TokenEvent], number: int) -> tuple[list[int], str | None, list[Any]]:
    reports = [each for event in events if event.id == number for each in (*event.logprobs, *event.prompt_logprobs)]
    return (
        completion_of(events, number),
        ending_of(events, number),
        [(each.token_id, round(each.logprob, 3)) for each in reports],
    )


@pytest.mark.parametrize("graphs", [False, True], ids=["torch", "graphs"])
@examples(60)
@given(requests=st.lists(REQUEST, min_size=1, max_size=8))
def test_completions_are_those_of_a_synchronous_loop(graphs: bool, requests: list[dict[str, Any]]) -> None:
    """Whatever settings come together, while requests come, end, wait for a slot and are cancelled."""
    expected = serve(runner_for(asynchronous=False), requests)
    found = serve(runner_for(asynchronous=True, graphs=graphs), requests)

    for number, request in enumerate(requests):
        one, other = summary_of(expected, number), summary_of(found, number)
        if request["cancel_after"] is None:
            assert one == other
        else:
            length = min(len(one[0]), len(other[0]))
            assert one[0][:length] == other[0][:length]
        endings = [event for event in found if event.id == number and (event.finish or event.error)]
        assert [endings[-1]] == endings
        assert [event for event in found if event.id == number][-1] == endings[0]


def test_a_step_is_launched_before_the_last_ones_tokens_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has to see no token of it; nothing is launched behind a completion's last token."""
    order, forward, read = list[str](), ModelRunner.forward, DeviceTokens.read

    def launch(self: ModelRunner, segments: Sequence[Segment], wanted: Sequence[int]) -> torch.Tensor:
        order.append("launch")
        return forward(self, segments, wanted)

    def reading(self: DeviceTokens) -> Any:
        order.append("read")
        return read(self)

    runner = runner_for(asynchronous=True, end_ids=())
    monkeypatch.setattr(ModelRunner, "forward", launch)
    monkeypatch.setattr(DeviceTokens, "read", reading)
    submit(runner, PROMPTS[1], 1, max_tokens=4)
    run(runner)

    assert ["launch", *["launch", "read"] * 3, "read"] == order


@pytest.mark.parametrize(
    ("facts", "settings"),
    [
        ({"rules": GenerationRules(no_repeat_ngram_size=2)}, {}),
        ({}, {"max_tokens": 0}),
    ],
    ids=["a model's rules", "no token"],
)
def test_what_needs_the_host_is_computed_to_the_end(
    facts: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_one(runner_for(asynchronous=False, **facts), settings)
    monkeypatch.setattr(DeviceTokens, "read", None)

    assert expected == run_one(runner_for(asynchronous=True, **facts), settings)


def run_one(runner: BatchingRunner, settings: dict[str, Any], prompt: Sequence[int] = PROMPTS[2]) -> list[TokenEvent]:
    submit(runner, prompt, 1, **settings)
    return run(runner)


@pytest.mark.parametrize("at", range(1, 8))
def test_a_step_for_the_host_leaves_out_what_has_just_ended(at: int) -> None:
    """A completion whose end token is in flight while a request comes that the host has to look at."""
    whole = completion_of(run_one(runner_for(asynchronous=False, end_ids=()), {}), 1)
    runner, events = runner_for(asynchronous=True, end_ids=(whole[4],)), list[TokenEvent]()
    submit(runner, PROMPTS[2], 1)
    for _ in range(at):
        runner.step(events.extend)

    submit(runner, PROMPTS[0], 2, max_tokens=0)
    events += run(runner)

    assert (whole[: whole.index(whole[4])], "stop") == (completion_of(events, 1), ending_of(events, 1))
    assert "length" == ending_of(events, 2)


@pytest.mark.parametrize("graphs", [False, True], ids=["torch", "graphs"])
def test_a_token_that_needs_more_of_the_vocabulary_is_sampled_again(graphs: bool) -> None:
    """What was launched with a token in its place is forgotten; its neighbours go on."""
    flat: dict[str, Any] = {"temperature": 5.0, "top_p": 0.95, "seed": 3}
    expected = [completion_of(run_one(runner_for(asynchronous=False), each), 1) for each in (flat, {})]
    runner = runner_for(asynchronous=True, graphs=graphs)
    submit(runner, PROMPTS[2], 0, **flat)
    submit(runner, PROMPTS[2], 1)
    events = run(runner)

    assert expected == [completion_of(events, number) for number in range(2)]


class Steps:
    """How the steps of a runner are launched; where it says so, one that continues the last fails."""

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int | None = None, error: Exception | None = None) -> None:
        self.laid_out, self.continued = 0, 0
        load, forward_next = StaticBatch.load, GraphExecutor.forward_next

        def counted_load(batch: StaticBatch, segments: Sequence[Segment]) -> None:
            self.laid_out += 1
            load(batch, segments)

        def counted_next(executor: GraphExecutor, tokens: torch.Tensor) -> torch.Tensor | None:
            logits = forward_next(executor, tokens)
            self.continued += logits is not None
            if error is not None and self.continued == fail_at:
                raise error
            return logits

        patch.setattr(StaticBatch, "load", counted_load)
        patch.setattr(GraphExecutor, "forward_next", counted_next)


def test_steps_of_the_same_rows_are_laid_out_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are listed only when they come or go, or when one needs a pass that reads more keys."""
    settings: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 4}, {"temperature": 1.0, "seed": 4, "top_k": 3}]
    expected, found = (runner_for(asynchronous=each, graphs=each, end_ids=()) for each in (False, True))
    steps, completions = Steps(monkeypatch), list[list[list[int]]]()
    for runner in (expected, found):
        for number, each in enumerate(settings):
            submit(runner, PROMPTS[2], number, str(number), max_tokens=24, **each)
        events = run(runner)
        completions.append([completion_of(events, number) for number in range(len(settings))])

    assert completions[0] == completions[1]
    assert 23 == steps.laid_out + steps.continued
    assert 4 >= steps.laid_out


@pytest.mark.parametrize("fail_at", [1, 2, 5])
@pytest.mark.parametrize("error", [OUT_OF_MEMORY[0], ValueError("a fault")], ids=["memory", "a fault"])
def test_a_step_that_fails_while_it_continues_the_last_is_computed_in_parts(
    error: Exception, fail_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens are fed to it by the host then; nobody's completion changes."""
    settings: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 4, "presence_penalty": 0.7}]
    expected = [completion_of(run_one(runner_for(asynchronous=False), each), 1) for each in settings]
    runner, steps = runner_for(asynchronous=True, graphs=True), Steps(monkeypatch, fail_at, error)
    for number, each in enumerate(settings):
        submit(runner, PROMPTS[2], number, **each)
    events = run(runner)

    assert fail_at <= steps.continued
    assert expected == [completion_of(events, number) for number in range(2)]


@pytest.mark.parametrize("at", range(4))
def test_cancelling_while_a_token_is_in_flight_frees_the_slot(at: int) -> None:
    """The one that waits for it gets its own completion, and the cancelled one nothing more."""
    expected = completion_of(run_one(runner_for(asynchronous=False), {}), 1)
    runner, events = runner_for(asynchronous=True, slots=1), list[TokenEvent]()
    submit(runner, PROMPTS[1], 5)
    submit(runner, PROMPTS[2], 1)
    for _ in range(at):
        runner.step(events.extend)

    runner.cancel(5)
    before = len(events)
    events += run(runner)

    assert [TokenEvent(5, finish="abort")] == [event for event in events[before:] if event.id == 5]
    assert expected == completion_of(events, 1)


def test_a_sequence_that_loses_its_slot_while_a_token_is_in_flight_goes_on() -> None:
    """One of the background, whose slot another takes; and of a tenant that has too many."""
    whole = run_one(runner_for(asynchronous=False, end_ids=()), {})
    runner, events = runner_for(asynchronous=True, slots=1, end_ids=()), list[TokenEvent]()
    params = SamplingParams(max_tokens=NEW)
    runner.submit(Submit(1, tuple(PROMPTS[2]), params, priority=BACKGROUND_PRIORITY))
    for _ in range(4):
        runner.step(events.extend)
    submit(runner, PROMPTS[1], 2, max_tokens=3)
    events += run(runner)

    assert runner.preemptions == 1
    assert completion_of(whole, 1) == completion_of(events, 1)
    assert 3 == len(completion_of(events, 2))


@pytest.mark.parametrize("graphs", [False, True], ids=["torch", "graphs"])
def test_requests_with_an_adapter_are_launched_like_others(graphs: bool, tmp_path: Path) -> None:
    """Beside some without; one whose adapter is removed while its token is in flight ends, and no other."""
    adapter = read(save_adapter(make(FAMILIES["llama"]), tmp_path), make(FAMILIES["llama"]))
    found = list[list[TokenEvent]]()
    for asynchronous in (False, True):
        runner, events = runner_for(asynchronous=asynchronous, graphs=graphs, end_ids=()), list[TokenEvent]()
        runner.add_adapter(adapter)
        for number in range(3):
            digest = adapter.digest if number else None
            params = SamplingParams(max_tokens=NEW if number < 2 else 4)
            runner.submit(Submit(number, tuple(PROMPTS[2]), params, adapter=digest))
        while not any(event.id == 2 and event.finish for event in events):
            runner.step(events.extend)
        runner.remove_adapter(adapter.digest)
        found.append(events + run(runner))

    expected, events = found
    assert [completion_of(expected, number) for number in (0, 2)] == [completion_of(events, each) for each in (0, 2)]
    assert completion_of(events, 0)[:4] != completion_of(events, 2)
    assert ["length", "abort", "length"] == [ending_of(events, number) for number in range(3)]


@pytest.mark.parametrize("error", OUT_OF_MEMORY[:1] + OUT_OF_MEMORY[2:3], ids=["torch", "the driver"])
def test_a_launch_that_there_is_no_memory_for_ends_only_what_needs_it(error: Exception) -> None:
    """The step in flight is read, those that decode go on, and the long prompt ends with the reason."""
    expected = completion_of(run_one(runner_for(asynchronous=False, end_ids=()), {}, PROMPTS[1]), 1)
    model_runner = create_torch_runner(MODEL, length=CONTEXT, slots=4, free_bytes=10**9)
    model_runner.executor = Scarce(model_runner.executor, 6, error)
    runner, events = BatchingRunner(loaded(MODEL), model_runner, asynchronous=True), list[TokenEvent]()

    submit(runner, PROMPTS[1], 1)
    runner.step(events.extend)
    submit(runner, PROMPTS[3], 2)
    events += run(runner)
    submit(runner, PROMPTS[1], 3)
    events += run(runner)

    assert "out of memory" in (ending_of(events, 2) or "")
    assert [expected, expected] == [completion_of(events, number) for number in (1, 3)]
    assert ["length", "length"] == [ending_of(events, number) for number in (1, 3)]


def test_a_device_that_fails_is_not_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a step is launched nor where its tokens are read."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.AcceleratorError("device-side assert")

    for owner, name in ((ModelRunner, "forward"), (DeviceTokens, "read")):
        runner = runner_for(asynchronous=True)
        submit(runner, PROMPTS[2], 1)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            with pytest.raises(torch.AcceleratorError):
                run(runner)
