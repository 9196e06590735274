"""A model that generates embeds, too: by its own hidden states, and without a trace in what it generates."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from msgspec import structs
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.ipc.messages import Embed, Embedded, ModelSpec, Submit, TokenEvent
from app.types import SamplingParams
from app.worker.embedding.causal import CausalEncoder
from app.worker.embedding.embedding_runner import EmbeddingRunner
from app.worker.execution.private_api import attention_implementation
from app.worker.heartbeat import PROGRESS
from app.worker.loading.loader import load
from app.worker.loading.model_files import LoadError
from app.worker.process import Runner, make_runner
from tests.unit.tiny_models import save_tiny_llama

SPEC = ModelSpec(
    name="",
    source="local",
    device="cpu",
    dtype="float32",
    revision=None,
    max_model_len=None,
    threads=0,
    max_batch_size=2,
)
INPUTS = ((5, 6, 7, 8, 9), (4,), (10, 11, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def loaded(
    folder: Path, pooling: Literal["mean", "last"], engine: Literal["batching", "serial"] = "batching", **changes: Any
) -> tuple[Runner, EmbeddingRunner]:
    """Return both runners of one model, as the worker has them."""
    spec = structs.replace(SPEC, name=str(folder), engine=engine, embeddings=pooling, **changes)
    model = load(spec, str(folder.parent / "tokenizer"), on_stage=lambda stage: None)
    attention = attention_implementation(model.pipeline.model)
    runner = make_runner(model, spec)
    causal = CausalEncoder(model, pooling, attention=attention if engine == "batching" else None)
    return runner, EmbeddingRunner(causal, 16)


def embed(runner: EmbeddingRunner) -> Tensor:
    found: dict[int, Tensor] = {}

    def report(embedded: list[Embedded], events: list[TokenEvent]) -> None:
        assert not [event.error for event in events if event.error]
        for message in embedded:
            for place, vector in zip(message.positions, message.vectors, strict=True):
                found[place] = torch.frombuffer(bytearray(vector), dtype=torch.float32)

    runner.submit(Embed(1, INPUTS))
    while runner.busy:
        runner.step(report)
    return torch.stack([found[place] for place in range(len(INPUTS))])


@pytest.mark.parametrize("engine", ["batching", "serial"])
def test_a_pass_over_long_texts_shows_that_it_goes_on(folder: Path, engine: Literal["batching", "serial"]):
    """Each part of the model is progress, so that nobody takes a long pass for one that hangs."""
    _, embedder = loaded(folder, "mean", engine)
    before = PROGRESS.count

    embed(embedder)

    assert PROGRESS.count - before > 10


def generate(runner: Runner, between: EmbeddingRunner | None = None) -> list[int]:
    """Generate greedily, and embed between any two steps."""
    tokens: list[int] = []

    def exchange(events: list[TokenEvent]) -> None:
        for event in events:
            assert event.error is None
            tokens.extend(event.token_ids)
        if between is not None:
            embed(between)

    runner.submit(Submit(7, (5, 6, 7, 8), SamplingParams(max_tokens=12, ignore_eos=True)))
    while runner.busy:
        runner.step(exchange)
    return tokens


@pytest.mark.parametrize("engine", ["batching", "serial"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_the_last_hidden_states_pooled_and_normalized(
    pooling: Literal["mean", "last"], engine: Literal["batching", "serial"], folder: Path
):
    _, embedder = loaded(folder, pooling, engine)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    with torch.inference_mode():
        for ids in INPUTS:
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            vector = states.mean(dim=0) if pooling == "mean" else states[-1]
            expected.append(vector / vector.norm())

    torch.testing.assert_close(embed(embedder), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["batching", "serial"])
def test_generation_is_the_same_with_passes_over_texts_between_its_steps(
    engine: Literal["batching", "serial"], folder: Path
):
    runner, embedder = loaded(folder, "mean", engine)
    undisturbed = generate(runner)
    assert 12 == len(undisturbed)
    assert undisturbed == generate(runner, embedder)


def test_compiled_layers_and_embeddings_exclude_each_other(folder: Path):
    with pytest.raises(LoadError, match=r"model\.compile: layers leaves no hidden states to read"):
        loaded(folder, "mean", compile="layers")


def test_a_model_that_embeds_has_its_own_layers(folder: Path):
    """Whatever is compiled beside them: an executor that takes the weights out of the model would leave none to run."""
    runner, _ = loaded(folder, "mean")
    assert "layers" != runner.compiled
