"""The serial runner generates what `generate` does, for one request at a time, and stops when cancelled."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextGenerationPipeline

from app.ipc.messages import ModelSpec, Submit, TokenEvent
from app.types import SamplingParams
from app.worker.execution.serial.serial_runner import SerialRunner
from app.worker.loaded_model import LoadedModel
from app.worker.loading.loader import load
from app.worker.sampling import prompt_scoring
from tests.unit.tiny_models import save_tiny_llama
from tests.unit.worker.families import CONTEXT, NOT_BATCHABLE, VOCABULARY, make
from tests.unit.worker.lora_adapters import merged, read, save_adapter

PROMPT = (5, 6, 7, 8)
SPEC = ModelSpec(name="", source="local", device="cpu", dtype="auto", revision=None, max_model_len=None, threads=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model whose own parameters are wild, which no request must inherit."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("llama"))
    GenerationConfig(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0).save_pretrained(folder)
    spec = msgspec.structs.replace(SPEC, name=str(folder))
    return replace(load(spec, str(folder / "saved"), on_stage=lambda stage: None), end_ids=())


def run(runner: SerialRunner, on_events: Callable[[list[TokenEvent]], None] = lambda events: None) -> list[TokenEvent]:
    """Step until nothing is left to do."""
    seen: list[TokenEvent] = []

    def exchange(events: list[TokenEvent]) -> None:
        seen.extend(events)
        on_events(events)

    while runner.busy:
        runner.step(exchange)
    return seen


def complete(model: LoadedModel, params: SamplingParams) -> tuple[list[int], str | None]:
    runner = SerialRunner(model)
    runner.submit(Submit(1, PROMPT, params))
    events = run(runner)
    return [token for event in events for token in event.token_ids], events[-1].finish


def generate(model: LoadedModel, **settings: Any) -> list[int]:
    """Return what transformers' own `generate` returns."""
    pretrained: Any = model.pipeline.model
    with torch.inference_mode():
        whole = pretrained.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            pad_token_id=0,
            **settings,
        )
    return [int(token) for token in whole[0, len(PROMPT) :]]


def test_a_greedy_completion_is_what_generate_returns(model: LoadedModel):
    """Token for token, and the length ends it; the model's own sampling settings are not used."""
    assert (generate(model, max_new_tokens=40, do_sample=False), "length") == complete(
        model, SamplingParams(max_tokens=40)
    )


def test_each_setting_reaches_the_model(model: LoadedModel):
    """Sampling with a seed gives what `generate` gives with that seed and those settings."""
    settings: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3}
    torch.manual_seed(11)
    expected = generate(model, max_new_tokens=30, do_sample=True, **settings)

    assert (expected, "length") == complete(model, SamplingParams(max_tokens=30, seed=11, **settings))


def test_a_seed_repeats_a_completion_and_no_seed_does_not(model: LoadedModel):
    """The same seed gives the same completion, another or none a different one."""
    completions = [
        complete(model, SamplingParams(max_tokens=30, temperature=1.0, seed=seed))[0] for seed in (3, 3, 4, None, None)
    ]

    assert completions[0] == completions[1]
    assert 4 == len({tuple(completion) for completion in completions})


def test_an_end_token_ends_the_completion_and_is_not_listed(model: LoadedModel):
    """The tokens before it are listed, and the finish says stop."""
    completion = generate(model, max_new_tokens=20, do_sample=False)
    end = next(token for token in completion[3:] if token not in completion[:3])
    expected = completion[: completion.index(end)]

    assert (expected, "stop") == complete(replace(model, end_ids=(end,)), SamplingParams(max_tokens=20))


def test_tenants_take_turns(model: LoadedModel):
    """However many one has waiting, another's request is next but one; each one's own keep their order."""
    runner = SerialRunner(model)
    order = [("greedy", number) for number in range(1, 6)] + [("small", 6), ("other", 7), ("small", 8)]
    for tenant, number in order:
        runner.submit(Submit(number, PROMPT, SamplingParams(max_tokens=1), tenant))
    events: list[TokenEvent] = []
    runner.step(events.extend)
    runner.submit(Submit(9, PROMPT, SamplingParams(max_tokens=1), "newcomer"))
    while runner.busy:
        runner.step(events.extend)

    assert [1, 6, 7, 9, 2, 8, 3, 4, 5] == [event.id for event in events if event.finish]


def test_the_first_event_says_that_the_model_began(model: LoadedModel):
    """An empty event comes before the first token, one event for each token, the end with the last."""
    runner = SerialRunner(model)
    runner.submit(Submit(9, PROMPT, SamplingParams(max_tokens=3)))

    events = run(runner)

    assert [(9, 0, None), (9, 1, None), (9, 1, None), (9, 1, "length")] == [
        (event.id, len(event.token_ids), event.finish) for event in events
    ]


def test_a_cancel_stops_before_the_next_token(model: LoadedModel):
    """Cancelled with its third token, a request has no fourth."""
    runner = SerialRunner(model)
    runner.submit(Submit(1, PROMPT, SamplingParams(max_tokens=500)))
    with_tokens: list[TokenEvent] = []

    def cancel_at_third(events: list[TokenEvent]) -> None:
        with_tokens.extend(event for event in events if event.token_ids)
        if len(with_tokens) == 3:
            runner.cancel(1)

    events = run(runner, cancel_at_third)

    assert (3, "abort") == (len(with_tokens), events[-1].finish)


def test_a_cancelled_request_that_waits_never_runs(model: LoadedModel):
    """It ends with one event, and the others run as if it had not been there."""
    runner = SerialRunner(model)
    for number in (1, 2, 3):
        runner.submit(Submit(number, PROMPT, SamplingParams(max_tokens=2)))
    runner.cancel(2)
    runner.cancel(77)

    events = run(runner)

    assert [TokenEvent(2, finish="abort")] == [event for event in events if event.id == 2]
    assert [1, 3] == [event.id for event in events if event.finish == "length"]


@pytest.mark.parametrize("prompt", [(), (10_000_000,), (-1,)], ids=["empty", "beyond the vocabulary", "negative"])
def test_a_prompt_that_the_model_cannot_read_ends_only_its_request(model: LoadedModel, prompt: tuple[int, ...]):
    """It gets an error event; the request after it completes."""
    runner = SerialRunner(model)
    runner.submit(Submit(1, prompt, SamplingParams(max_tokens=2)))
    runner.submit(Submit(2, PROMPT, SamplingParams(max_tokens=2)))

    events = run(runner)

    assert [(1, True)] == [(event.id, event.error is not None) for event in events if event.id == 1]
    assert "length" == events[-1].finish


class BrokenPipeline:
    """Raises in place of an completion."""

    model = torch.nn.Module()

    def __init__(self, error: Exception) -> None:
        self.error = error

    def forward(self, inputs: object, **settings: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (IndexError("row 5"), "IndexError"),
        (MemoryError("row 5"), "memory"),
        (torch.OutOfMemoryError("row 5"), "memory"),
    ],
    ids=["any", "memory", "device memory"],
)
def test_a_failure_ends_only_its_request(model: LoadedModel, error: Exception, words: str):
    """The client sees the kind of error and nothing of its message."""
    runner = SerialRunner(replace(model, pipeline=BrokenPipeline(error)))  # type: ignore[arg-type]  # a fake
    runner.submit(Submit(1, PROMPT, SamplingParams(max_tokens=2)))

    last = run(runner)[-1]

    assert words in str(last.error)
    assert "row 5" not in str(last.error)
    assert not runner.busy


def test_a_broken_device_is_fatal(model: LoadedModel):
    """After an error of the accelerator nothing it computes can be trusted: the process has to go."""
    runner = SerialRunner(replace(model, pipeline=BrokenPipeline(torch.AcceleratorError("lost"))))  # type: ignore[arg-type]  # a fake
    runner.submit(Submit(1, PROMPT, SamplingParams(max_tokens=2)))

    with pytest.raises(torch.AcceleratorError):
        run(runner)


def test_the_saved_tokenizer_is_complete(model: LoadedModel):
    """What the loader leaves for the API process holds vocabulary and chat template."""
    tokenizer = model.pipeline.tokenizer
    assert tokenizer is not None
    folder = Path(tokenizer.name_or_path) / "saved"

    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        file.name for file in folder.iterdir()
    }


@torch.inference_mode()
def reference(model: LoadedModel, ids: tuple[int, ...]) -> torch.Tensor:
    """Return (tokens, vocab) float32: what an ordinary forward pass makes of each next token."""
    pretrained: Any = model.pipeline.model
    logits: torch.Tensor = pretrained(input_ids=torch.tensor([ids])).logits[0]
    return logits.float().log_softmax(dim=-1)


def test_a_prompt_is_scored_as_by_a_forward_pass(model: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    """In as many parts as memory needs; no token is generated where none is wanted."""
    monkeypatch.setattr(prompt_scoring, "HOST_BYTES", 0)
    monkeypatch.setattr(prompt_scoring, "MIN_ROWS", 2)
    runner, expected = SerialRunner(model), reference(model, PROMPT)
    runner.submit(Submit(1, PROMPT, SamplingParams(max_tokens=0, prompt_logprobs=2)))
    runner.submit(Submit(2, PROMPT[:1], SamplingParams(max_tokens=1, prompt_logprobs=2)))
    events = run(runner)

    first = [event for event in events if event.id == 1]
    assert [0, 2, 1, 0] == [len(event.prompt_logprobs) for event in first]
    for row, token, score in zip(expected, PROMPT[1:], [t for e in first for t in e.prompt_logprobs], strict=False):
        assert (token, 1 + int((row > row[token]).sum())) == (score.token_id, score.rank)
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert row.topk(2).indices.tolist() == [each for each, _ in score.top]
    assert ("length", 0) == (first[-1].finish, sum(len(event.token_ids) for event in first))
    assert [0, 1] == [len(event.token_ids) for event in events if event.id == 2]
    assert not any(event.prompt_logprobs for event in events if event.id == 2)


def test_logprobs_are_the_models_own(model: LoadedModel):
    """Whatever the settings make of the scores: here a penalty and a temperature."""
    params = SamplingParams(max_tokens=5, logprobs=1, temperature=0.7, seed=1, repetition_penalty=1.5)
    runner = SerialRunner(model)
    runner.submit(Submit(1, PROMPT, params))
    events = run(runner)
    scores = [score for event in events for score in event.logprobs]
    tokens = tuple(token for event in events for token in event.token_ids)

    rows = reference(model, PROMPT + tokens)[len(PROMPT) - 1 :]
    assert tokens == tuple(score.token_id for score in scores)
    for row, score in zip(rows, scores, strict=False):
        assert score.logprob == pytest.approx(float(row[score.token_id]), abs=1e-4)
        assert [int(row.argmax())] == [each for each, _ in score.top]
    assert 5 == len(scores)


def test_a_cancel_ends_the_scoring_of_a_prompt(model: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    """After the part that is being computed; nothing is generated then."""
    monkeypatch.setattr(prompt_scoring, "HOST_BYTES", 0)
    monkeypatch.setattr(prompt_scoring, "MIN_ROWS", 1)
    runner = SerialRunner(model)
    runner.submit(Submit(1, PROMPT, SamplingParams(max_tokens=5, prompt_logprobs=0)))
    events = run(runner, lambda events: runner.cancel(1) if events[0].prompt_logprobs else None)

    assert (1, 0) == (sum(len(e.prompt_logprobs) for e in events), sum(len(e.token_ids) for e in events))
    assert "abort" == events[-1].finish


@pytest.mark.parametrize("name", ["mamba", "bloom", "gpt-j"])
def test_any_model_that_is_served_alone_is_scored(name: str, model: LoadedModel):
    """Of whatever kind its state and its attention are."""
    pretrained = make(NOT_BATCHABLE[name][0])
    pipeline = TextGenerationPipeline(model=pretrained, tokenizer=model.pipeline.tokenizer)
    single = replace(model, pipeline=pipeline, vocab_size=VOCABULARY, context_length=CONTEXT)
    runner = SerialRunner(single)
    runner.submit(Submit(1, PROMPT, SamplingParams(max_tokens=2, prompt_logprobs=0, logprobs=0)))
    events = run(runner)

    tokens = PROMPT + tuple(token for event in events for token in event.token_ids)
    scores = [score for event in events for score in (*event.prompt_logprobs, *event.logprobs)]
    assert tokens[1:] == tuple(score.token_id for score in scores)
    for row, score in zip(reference(single, tokens), scores, strict=False):
        assert score.logprob == pytest.approx(float(row[score.token_id]), abs=1e-4)


def test_an_adapter_gives_what_generate_does_with_pefts_merged_model(tmp_path: Path):
    """Between two requests without one; removed, it is refused."""
    folder = save_tiny_llama(tmp_path / "llama")
    base = replace(
        load(msgspec.structs.replace(SPEC, name=str(folder)), str(folder / "saved"), on_stage=lambda stage: None),
        end_ids=(),
    )
    adapter_folder = save_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter", r=4)
    adapter = read(adapter_folder, base.pipeline.model)
    reference: Any = merged(AutoModelForCausalLM.from_pretrained(folder), adapter_folder)
    runner, params = SerialRunner(base), SamplingParams(max_tokens=12)
    runner.add_adapter(adapter)

    for number, digest in enumerate((None, adapter.digest, None)):
        runner.submit(Submit(number, PROMPT, params, adapter=digest))
    events = run(runner)
    runner.remove_adapter(adapter.digest)
    runner.submit(Submit(3, PROMPT, params, adapter=adapter.digest))

    said = [[token for event in events if event.id == number for token in event.token_ids] for number in range(3)]
    plain = generate(base, max_new_tokens=12, do_sample=False)
    with torch.inference_mode():
        whole = reference.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
    assert [plain, whole[0, len(PROMPT) :].tolist(), plain] == said
    assert said[0] != said[1]
    assert "no longer loaded" in str(run(runner)[-1].error)
