"""The native decoder's packed weights: one copy of them in memory, and the model as it was when they are given back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from app.worker.execution.native.decoder_weights import DecoderWeights
from app.worker.execution.quantization import quantize_linears, round_to_int8
from tests.unit.worker.families import FAMILIES, make

pytestmark = pytest.mark.usefixtures("compiler")
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def in_int8(model: Any) -> Any:
    quantize_linears(model, IDS, round_to_int8)
    return model


def in_float16(stored: Callable[[Any], Any]) -> bool:
    return stored is STORED[2]


STORED: list[Callable[[Any], Any]] = [
    lambda model: model,
    lambda model: model.bfloat16(),
    lambda model: model.bfloat16().float(),
    in_int8,
]


@pytest.mark.parametrize("stored", STORED, ids=["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_are_given_back(family: str, stored: Callable[[Any], Any]) -> None:
    """Bit for bit unless float16 stored them, in every type that they are stored in, with biases and without."""
    model = stored(make(FAMILIES[family]))
    logits, state = logits_of(model), {name: each.clone() for name, each in model.state_dict().items()}
    weights = DecoderWeights(model)

    weights.pack()
    weights.restore()

    restored = model.state_dict()
    assert state.keys() == restored.keys()
    for name, each in state.items():
        # Weights that float16 holds lose what is below its smallest number.
        torch.testing.assert_close(restored[name], each, rtol=0, atol=2**-24 if in_float16(stored) else 0)
    # Not bit for bit: how a product is summed may depend on where in memory its weights lie.
    torch.testing.assert_close(logits_of(model), logits)


def test_a_packed_model_has_no_other_copy_of_its_weights() -> None:
    """Embeddings and norms stay; of the linear layers nothing is left."""
    model = make(FAMILIES["llama"])
    embedding = model.get_input_embeddings().weight.numel()

    DecoderWeights(model).pack()

    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    assert [embedding] == [weight.numel() for weight in matrices]


def test_packing_that_fails_halfway_is_undone() -> None:
    model = make(FAMILIES["llama"])
    before = logits_of(model)
    del model.model.layers[2].mlp.down_proj.weight
    weights = DecoderWeights(model)

    with pytest.raises(AttributeError):
        weights.pack()
    weights.restore()
    model.model.layers[2].mlp.down_proj.weight = make(FAMILIES["llama"]).model.layers[2].mlp.down_proj.weight

    assert torch.equal(before, logits_of(model))
