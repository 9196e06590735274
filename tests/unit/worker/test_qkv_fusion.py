"""Several layers as one product: the same numbers, in whatever order they are asked for."""

from itertools import permutations

import pytest
import torch
from torch import nn

from app.worker.execution.qkv_fusion import Fused, Part, fuse_linears
from tests.unit.worker.families import FAMILIES, make

IDS = torch.tensor([[5, 6, 7, 8, 9]])


class Counted(nn.Module):
    """Counts how often it computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        done: torch.Tensor = self.inner(x)
        return done


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_one_product_serves_all_layers_of_an_input(order: tuple[int, ...]) -> None:
    """Whichever is called first; the next input is computed anew, also where not all layers wanted the last one."""
    product = Counted(nn.Linear(6, 9))
    fused = Fused(product, [4, 3, 2])
    parts = [Part(fused, index) for index in range(3)]
    one, other = torch.randn(2, 6), torch.randn(2, 6)

    for number, x in enumerate((one, other, one)):
        expected = product.inner(x).split([4, 3, 2], dim=-1)
        for index in order if number else order[:2]:
            assert torch.equal(expected[index], parts[index](x))

    assert 3 == product.calls


def test_a_layer_that_is_asked_twice_computes_twice() -> None:
    """Nothing is kept longer than it is needed."""
    product = Counted(nn.Linear(6, 5))
    fused, x = Fused(product, [3, 2]), torch.randn(1, 6)

    assert torch.equal(fused.part(0, x), fused.part(0, x))
    assert 2 == product.calls
    fused.part(1, x)
    assert fused._input is None


@pytest.mark.parametrize(
    ("family", "groups", "layers"), [("llama", 6, 15), ("opt", 3, 9), ("phi", 3, 9), ("gpt2", 0, 0)]
)
def test_a_model_of_fused_layers_gives_the_same_scores(family: str, groups: int, layers: int) -> None:
    """Queries, keys and values together, and gate and up; with and without bias, as far as a model has them."""
    model = make(FAMILIES[family])
    with torch.inference_mode():
        before = model(input_ids=IDS).logits
    products: list[Counted] = []

    def pack(linear: nn.Linear) -> nn.Module:
        products.append(Counted(linear))
        return products[-1]

    count = fuse_linears(model, pack)

    with torch.inference_mode():
        after = model(input_ids=IDS).logits
    assert (layers, groups) == (count, len(products))
    assert [1] * groups == [product.calls for product in products]
    assert (after - before).norm() <= 1e-5 * before.norm()


def test_what_cannot_be_packed_together_stays_as_it_was() -> None:
    model = make(FAMILIES["llama"])

    assert 0 == fuse_linears(model, lambda linear: None)
    assert not any(isinstance(each, Part) for each in model.modules())
