"""What torch and transformers do not promise is still there; a failure here names what a new release has changed."""

import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

import app.worker
from app.worker.execution import private_api
from tests.unit.worker.families import FAMILIES, make

PRIVATE = re.compile(
    r"\btorch\.(\w+\.)*_\w+|\btorch\.ops\.(?!llm_service\b)|_attn_implementation\b(?<!set_attn_implementation)"
    r"|_can_set_attn_implementation|_no_split_modules|_compiled_call_impl"
)
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="FBGEMM is for x86 only")


@pytest.mark.parametrize("feature", [private_api.cpu_has_bfloat16, private_api.cpu_has_vnni])
def test_torch_says_what_the_processor_can_do(feature: Any) -> None:
    assert feature() in {True, False}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names are those of x86")
def test_what_torch_says_of_the_processor_is_what_the_system_says() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()

    assert private_api.cpu_has_bfloat16() == ("avx512_bf16" in flags or "amx_tile" in flags)


@X86
def test_onednn_computes_with_packed_weights() -> None:
    """`torch.ops.mkldnn._reorder_linear_weight` and `_linear_pointwise`."""
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(5, 24)

    for each in (bias, None):
        out = private_api.onednn_linear(weight, each)(x)
        assert torch.allclose(functional.linear(x, weight, each), out, atol=1e-5)


@X86
@pytest.mark.filterwarnings("ignore")
def test_fbgemm_computes_with_float16_weights() -> None:
    """`torch.ops.quantized.linear_prepack_fp16` and `linear_dynamic_fp16`."""
    weight, bias, x = torch.randn(40, 24).half().float(), torch.randn(40), torch.randn(5, 24)

    out = private_api.fbgemm_float16_linear(weight, bias)(x)

    assert torch.allclose(functional.linear(x, weight, bias), out, atol=1e-4)


@X86
@pytest.mark.filterwarnings("ignore")
def test_integers_are_multiplied_exactly() -> None:
    """`torch.ops.quantized.linear_prepack`, `linear_unpack` and the operator that quantizes its input."""
    integers = torch.randint(-127, 128, (8, 16)).float()
    weights = private_api.Int8Weights(integers * 0.5, torch.full((8,), 0.5))
    x = torch.randint(-60, 61, (3, 16)).float()

    assert torch.equal(integers * 0.5, weights.dequantized())
    assert torch.equal(functional.linear(x, integers * 0.5), weights.multiply(x, 1.0, 64))


class Scaled(nn.Module):
    """Multiplies by an integer of its own."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_modules_share_a_graph_whatever_their_integers_and_run_as_before_once_that_is_undone() -> None:
    """`torch._dynamo.config.allow_unspec_int_on_nn_module` and `Module._compiled_call_impl`."""
    graphs: list[Any] = []
    modules = [Scaled(factor) for factor in range(3, 13)]

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    private_api.treat_module_integers_as_inputs()
    for module in modules:
        module.compile(dynamic=True, backend=backend)
        assert module.factor == module(torch.ones(1)).item()
    # As constants, the integers would make a graph for each module, up to the limit of 8.
    assert len(graphs) <= 2

    compiled = len(graphs)
    torch._dynamo.reset()
    for module in modules:
        private_api.undo_module_compile(module)
        module(torch.ones(1))
    assert compiled == len(graphs)


def test_a_model_says_how_it_attends_and_what_its_layers_are() -> None:
    """`config._attn_implementation`, `_can_set_attn_implementation` and `_no_split_modules`."""
    model = make(FAMILIES["llama"])
    model.set_attn_implementation("eager")
    assert "eager" == private_api.attention_implementation(model)
    assert private_api.can_set_attention(model)
    assert {"LlamaDecoderLayer"} == private_api.decoder_layer_names(model)

    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=9, hidden_size=32, n_layer=1, n_head=4))
    assert not private_api.can_set_attention(bloom)


def test_nothing_else_in_the_worker_uses_what_is_private() -> None:
    """Names with a leading underscore, and operators that no documentation lists."""
    folder = Path(app.worker.__file__).parent
    sources = {path: path.read_text() for path in folder.rglob("*.py") if path.name != "private_api.py"}

    assert {} == {path: found for path, text in sources.items() if (found := PRIVATE.findall(text))}
    assert PRIVATE.search((folder / "execution" / "private_api.py").read_text())
