"""Packed weights: other operators, the same numbers, and the plain path where they fail."""

from typing import Any

import pytest
import torch
from torch import nn

from app.engine.worker import packing
from app.engine.worker.packing import PackedLinear, pack_linears
from tests.unit.engine.families import FAMILIES, VOCABULARY, make

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def scores(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_gives_the_same_scores(family: str, dtype: torch.dtype) -> None:
    """With and without bias, tied output included: all layers are replaced, or none where the processor cannot."""
    model = make(FAMILIES[family]).to(dtype)
    before, layers = scores(model), [each for each in model.modules() if type(each) is nn.Linear]

    packed = pack_linears(model, least=0)

    left = [each for each in model.modules() if type(each) is nn.Linear]
    assert (len(layers), 0) == (packed, len(left)) or (dtype == torch.bfloat16 and (0, layers) == (packed, left))
    assert (scores(model) - before).float().norm() <= packing.TOLERANCE[dtype] * before.float().norm()
    assert VOCABULARY == before.shape[-1]


def test_where_packing_fails_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that computes something else is found out before any layer is replaced."""
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: torch.zeros(3, 1))
    model = make(FAMILIES["llama"])
    before = scores(model)

    assert 0 == pack_linears(model, least=0)

    assert torch.equal(before, scores(model))
