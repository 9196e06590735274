"""Linear layers in panels: the numbers of torch's, for any number of tokens and outputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from app.engine.worker.panels import PANEL, PanelLinear
from app.engine.worker.programs import CompileError

pytestmark = pytest.mark.usefixtures("compiler")
TOLERANCE = 2e-6


@pytest.mark.parametrize("outputs", [1, PANEL, 3 * PANEL + 5, 200])
@pytest.mark.parametrize(("halves", "bias"), [(True, True), (True, False), (False, True)])
def test_a_layer_in_panels_computes_what_torch_computes(outputs: int, halves: bool, bias: bool) -> None:
    """From one token, over all numbers of them that are computed together, to several blocks of many."""
    torch.manual_seed(3)
    linear = nn.Linear(51, outputs, bias=bias)
    if halves:
        linear.weight.data = linear.weight.data.bfloat16().float()

    layer = PanelLinear(linear)

    assert layer.panels.dtype == (torch.float16 if halves else torch.float32)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 13, 128, 129, 300):
        x = torch.randn(1, tokens, 51)
        expected = linear(x).detach()
        assert (layer(x) - expected).norm() <= TOLERANCE * expected.norm()
        assert expected.shape == layer(x).shape


def test_a_tokens_numbers_do_not_depend_on_its_company() -> None:
    """Bit for bit: who else is in the batch changes no answer here."""
    torch.manual_seed(3)
    layer = PanelLinear(nn.Linear(576, 96))
    x = torch.randn(200, 576)

    alone = torch.cat([layer(each[None]) for each in x])

    for tokens in (2, 3, 4, 5, 6, 7, 32, 200):
        assert torch.equal(alone[:tokens], layer(x[:tokens]))


def test_input_with_gaps_is_read_rightly() -> None:
    linear = nn.Linear(8, 16)
    x = torch.randn(8, 5).T

    assert torch.allclose(PanelLinear(linear)(x), functional.linear(x, linear.weight, linear.bias), atol=1e-6)


def test_numbers_of_16_bits_are_refused() -> None:
    with pytest.raises(CompileError, match="does not take"):
        PanelLinear(nn.Linear(8, 8, dtype=torch.bfloat16))
