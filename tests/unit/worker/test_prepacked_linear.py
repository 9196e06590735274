"""Prepacked linear layers: other operators, the same outputs, and the plain layer where they fail."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from app.worker.execution import private_api
from app.worker.execution.linear_modules import TOLERANCE, replace_linears
from app.worker.execution.native.packed_linear import NativeLinear
from app.worker.execution.torch.prepacked_linear import float16_linear, onednn_linear, prepack_linears
from tests.unit.worker.families import FAMILIES, VOCABULARY, make

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def plain_linears(model: Any) -> list[nn.Module]:
    return [each for each in model.modules() if type(each) in {nn.Linear, Conv1D}]


@pytest.mark.parametrize("family", ["llama", "phi", "opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prepacked_model_computes_the_same_logits(family: str, dtype: torch.dtype) -> None:
    """With and without bias, tied output included: all layers are packed, or none where the processor cannot."""
    model = make(FAMILIES[family]).to(dtype)
    before, layers = logits_of(model), plain_linears(model)

    packed = prepack_linears(model, min_weights=0)

    left = plain_linears(model)
    assert (len(layers), 0) == (packed, len(left)) or (dtype == torch.bfloat16 and (0, layers) == (packed, left))
    assert (logits_of(model) - before).float().norm() <= TOLERANCE[dtype] * before.float().norm()
    assert VOCABULARY == before.shape[-1]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("family", ["llama", "phi", "opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_linears_compute_the_same_logits(family: str, dtype: torch.dtype) -> None:
    model = make(FAMILIES[family]).to(dtype)
    before, layers = logits_of(model), plain_linears(model)

    assert len(layers) == replace_linears(model, NativeLinear, min_weights=0)

    assert [] == plain_linears(model)
    assert (logits_of(model) - before).float().norm() <= TOLERANCE[dtype] * before.float().norm()


def test_float32_weights_are_stored_in_16_bits_only_where_that_loses_nothing() -> None:
    """A checkpoint in bfloat16 fits 16 bits; one that was trained in float32 needs all its bits."""
    exact, half = make(FAMILIES["llama"]), make(FAMILIES["llama"]).to(torch.bfloat16).float()
    expected = logits_of(half)

    assert 0 == replace_linears(exact, float16_linear, min_weights=0)
    replaced = replace_linears(half, float16_linear, min_weights=0)

    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert replaced
        assert [] == plain_linears(half)
    assert (logits_of(half) - expected).norm() <= 1e-5 * expected.norm()


def test_weights_beyond_float16_stay_in_float32() -> None:
    """A weight that float16 would make infinite refuses the layer."""
    layer = nn.Linear(8, 4)
    layer.weight.data[0, 0] = 2.0**20

    with pytest.raises(ArithmeticError):
        float16_linear(layer)


@pytest.mark.parametrize("kernel", ["fbgemm_float16_linear", "onednn_linear"])
@pytest.mark.parametrize("broken", [lambda x: torch.zeros(3, 1), lambda x: x.no_such_attribute], ids=["wrong", "error"])
def test_where_packing_fails_the_layers_stay_as_they_are(
    kernel: str, broken: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator that computes something else or is renamed is found out before its layer is replaced."""
    monkeypatch.setattr(private_api, kernel, lambda weight, bias: broken)
    model = make(FAMILIES["llama"]).to(torch.bfloat16).float()
    before = logits_of(model)

    build = float16_linear if kernel.startswith("fbgemm") else onednn_linear
    assert 0 == replace_linears(model, build, min_weights=0)

    assert torch.equal(before, logits_of(model))


def test_small_layers_and_other_types_stay_as_they_are() -> None:
    """A call of a packed operator costs more than it gains there; in float16 there is none."""
    model = make(FAMILIES["llama"])
    assert 0 == prepack_linears(model)
    assert 0 == prepack_linears(model.to(torch.float16), min_weights=0)


def test_a_model_is_never_in_memory_twice() -> None:
    """Each layer's weights are freed as soon as their packed copy has taken their place."""
    alive: list[int] = []
    seen: list[weakref.ref[nn.Linear]] = []

    class Copy(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = linear.weight.detach().clone(), linear.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    def build(linear: nn.Linear) -> nn.Module:
        seen.append(weakref.ref(linear))
        alive.append(sum(each() is not None for each in seen))
        return Copy(linear)

    assert 6 < replace_linears(make(FAMILIES["phi"]), build, min_weights=0)
    # The one at hand, and the one before it while the next is looked for.
    assert max(alive) <= 2
