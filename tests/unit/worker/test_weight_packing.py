"""Packed weights: other operators, the same numbers, and the plain path where they fail."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from app.worker.execution.native.packed_linear import NativeLinear
from app.worker.execution.torch import weight_packing as packing
from app.worker.execution.torch.weight_packing import OF_TORCH, HalfLinear, PackedLinear, Way, pack_linears
from tests.unit.worker.families import FAMILIES, VOCABULARY, make

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def scores(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama", "phi", "opt", "gpt2"])
@pytest.mark.parametrize(
    ("dtype", "ways"),
    [(torch.float32, None), (torch.float32, OF_TORCH), (torch.bfloat16, None)],
    ids=["float32", "float32 without a compiler", "bfloat16"],
)
def test_a_packed_model_gives_the_same_scores(family: str, dtype: torch.dtype, ways: Sequence[Way] | None) -> None:
    """With and without bias, tied output included: all layers are replaced, or none where the processor cannot."""
    model = make(FAMILIES[family]).to(dtype)
    before, layers = scores(model), [each for each in model.modules() if type(each) in {nn.Linear, Conv1D}]

    packed = pack_linears(model, ways, least=0)

    left = [each for each in model.modules() if type(each) in {nn.Linear, Conv1D}]
    assert (len(layers), 0) == (packed, len(left)) or (dtype == torch.bfloat16 and (0, layers) == (packed, left))
    assert (scores(model) - before).float().norm() <= packing.TOLERANCE[dtype] * before.float().norm()
    assert VOCABULARY == before.shape[-1]


def test_float32_weights_are_halved_only_where_that_loses_nothing() -> None:
    """A checkpoint in bfloat16 fits 16 bits; one that was trained in float32 keeps all its bits."""
    exact, halved = make(FAMILIES["llama"]), make(FAMILIES["llama"]).to(torch.bfloat16).float()
    expected = scores(halved)

    pack_linears(exact, OF_TORCH, least=0)
    pack_linears(halved, OF_TORCH, least=0)

    assert not any(type(each) is HalfLinear for each in exact.modules())
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert not any(type(each) in {nn.Linear, PackedLinear} for each in halved.modules())
    assert (scores(halved) - expected).norm() <= 1e-5 * expected.norm()


def test_weights_beyond_float16_stay_in_float32() -> None:
    """A weight that float16 would make infinite refuses the layer."""
    layer = nn.Linear(8, 4)
    layer.weight.data[0, 0] = 2.0**20

    with pytest.raises(ArithmeticError):
        HalfLinear(layer)


@pytest.mark.parametrize("way", [NativeLinear, HalfLinear, PackedLinear])
def test_where_packing_fails_the_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, way: type[nn.Module]) -> None:
    """An operator that computes something else is found out before its layer is replaced."""
    monkeypatch.setattr(way, "forward", lambda self, x: torch.zeros(3, 1))
    monkeypatch.setattr(packing, "WAYS", {torch.float32: (way,)})
    model = make(FAMILIES["llama"]).to(torch.bfloat16).float()
    before = scores(model)

    assert 0 == pack_linears(model, least=0)

    assert torch.equal(before, scores(model))


def test_a_model_is_never_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's weights are let go as soon as their packed copy has taken their place."""
    alive: list[int] = []
    seen: list[weakref.ref[nn.Linear]] = []

    def pack(linear: nn.Linear, *others: Any) -> nn.Module:
        seen.append(weakref.ref(linear))
        alive.append(sum(each() is not None for each in seen))
        return nn.Identity()

    monkeypatch.setattr(packing, "_pack", pack)
    model = make(FAMILIES["phi"])

    assert 6 < pack_linears(model)
    # The one at hand, and the one before it while the next is looked for.
    assert max(alive) <= 2
