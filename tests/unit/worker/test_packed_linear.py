"""Packed linear layers: the results of torch's, for any number of tokens and outputs."""

import platform

import pytest
import torch
from torch import nn
from torch.nn import functional

from app.worker.execution.native import native_build
from app.worker.execution.native.native_build import CompileError
from app.worker.execution.native.packed_linear import NR, NativeLinear
from app.worker.execution.quantization import fits_int8, quantize_int8

pytestmark = pytest.mark.usefixtures("compiler")
TOLERANCE = 2e-6


@pytest.mark.parametrize("outputs", [1, NR, 3 * NR + 5, 200])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_torch_computes(outputs: int, kind: torch.dtype, bias: bool) -> None:
    """In the smallest type that holds its weights; for one token, one call of the microkernel and several blocks."""
    torch.manual_seed(3)
    linear = nn.Linear(51, outputs, bias=bias)
    if kind == torch.float16:
        linear.weight.data = linear.weight.data.bfloat16().float()
    if kind == torch.int8:
        whole, scales = quantize_int8(linear.weight.data)
        linear.weight.data = whole * scales

    layer = NativeLinear(linear)

    assert kind == layer.packed_weight.dtype
    for tokens in (1, 2, 3, 4, 5, 6, 7, 13, 128, 129, 300):
        x = torch.randn(1, tokens, 51)
        expected = linear(x).detach()
        assert (layer(x) - expected).norm() <= TOLERANCE * expected.norm()
        assert expected.shape == layer(x).shape


@pytest.fixture(params=["as the processor has it", "-mno-avx512bf16"])
def pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16 by the processor's own instructions, if it has any, and as floats."""
    if request.param.startswith("-m"):
        if platform.machine() != "x86_64":
            pytest.skip("only on x86 it can be chosen what the processor may do")
        monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, request.param))


@pytest.mark.parametrize("outputs", [1, NR, 3 * NR + 5, 200])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("pairs")
def test_a_layer_in_bfloat16_is_as_near_to_exact_numbers_as_torchs(outputs: int, bias: bool) -> None:
    """Rounded once, at the end; for one token, one call of the microkernel and several blocks."""
    torch.manual_seed(3)
    linear = nn.Linear(70, outputs, bias=bias, dtype=torch.bfloat16)

    layer = NativeLinear(linear)

    assert torch.bfloat16 == layer.packed_weight.dtype
    for tokens in (1, 2, 6, 7, 11, 12, 13, 25, 128, 129, 300):
        x = torch.randn(1, tokens, 70).bfloat16()
        exact = functional.linear(x.float(), linear.weight.float(), linear.bias.float() if bias else None).detach()
        found = layer(x)
        assert (exact.shape, torch.bfloat16) == (found.shape, found.dtype)
        assert (found - exact).norm() <= 1.01 * (linear(x) - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1, 1e10])
def test_weights_are_rounded_to_the_nearest_of_255_steps_once(size: float) -> None:
    """An output of great weights does not coarsen another's, and rounding again changes nothing."""
    torch.manual_seed(3)
    weight = torch.randn(40, 64) * size
    weight[7] *= 1000
    weight[9] = 0

    whole, scales = quantize_int8(weight)

    rounded = whole * scales
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= 0.501 * step).all()
    assert fits_int8(rounded)
    assert not fits_int8(weight)


def test_weights_are_only_int8_if_all_outputs_fit() -> None:
    """Though the first output, which is checked before the others, does."""
    linear = nn.Linear(51, 32)
    linear.weight.data[0] = 1.0

    layer = NativeLinear(linear)

    assert torch.float32 == layer.packed_weight.dtype
    assert layer.scales is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("pairs")
def test_the_bits_of_a_token_do_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Other requests in the batch change no completion."""
    torch.manual_seed(3)
    layer = NativeLinear(nn.Linear(576, 96, dtype=dtype))
    x = torch.randn(200, 576).to(dtype)

    expected = torch.cat([layer(each[None]) for each in x])

    for tokens in (2, 3, 4, 5, 6, 7, 12, 13, 32, 200):
        assert torch.equal(expected[:tokens], layer(x[:tokens]))


def test_input_with_gaps_is_read_rightly() -> None:
    linear = nn.Linear(8, 16)
    x = torch.randn(8, 5).T

    assert torch.allclose(NativeLinear(linear)(x), functional.linear(x, linear.weight, linear.bias), atol=1e-6)


@pytest.mark.parametrize(("inputs", "dtype"), [(8, torch.float16), (7, torch.bfloat16)])
def test_an_unsupported_layer_is_refused(inputs: int, dtype: torch.dtype) -> None:
    """Float16, and an odd number of inputs in bfloat16."""
    with pytest.raises(CompileError, match=f"there is no kernel for {inputs} inputs"):
        NativeLinear(nn.Linear(inputs, 8, dtype=dtype))
