"""Linear layers in int8: close to the model's own numbers, the same in any batch, and refused where they go wrong."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from app.ipc.messages import ModelSpec, Submit, TokenEvent
from app.types import SamplingParams
from app.worker.execution import way_timing
from app.worker.execution.executor_selection import select_executor
from app.worker.execution.linear_modules import linear_modules
from app.worker.execution.native.native_executors import NativeDecoderExecutor
from app.worker.execution.native.packed_linear import NativeLinear
from app.worker.execution.quantization import fits_int8, quantize_linears, round_to_int8
from app.worker.execution.torch.int8_linear import Int8Linear, has_integer_linears, int8_linear
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.loaded_model import LoadedModel
from app.worker.loading import loader
from app.worker.loading.loader import load
from app.worker.loading.model_files import LoadError
from app.worker.process import Runner, make_runner
from tests.unit.tiny_models import chatml_tokenizer, save_tiny_llama
from tests.unit.worker.families import FAMILIES, make

IDS = torch.arange(5, 25)[None]
SPEC = ModelSpec(
    name="",
    source="local",
    device="cpu",
    dtype="auto",
    quantization="int8",
    revision=None,
    max_model_len=None,
    threads=1,
)


def load_int8(folder: Path, **changes: Any) -> LoadedModel:
    spec = msgspec.structs.replace(SPEC, name=str(folder), **changes)
    return load(spec, str(folder / "saved"), on_stage=lambda stage: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", ["llama", "phi", "opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_but_the_last_computes_in_int8_and_the_effect_is_measured(family: str, dtype: torch.dtype) -> None:
    """With and without bias, and GPT-2's own kind of layer."""
    model = make(FAMILIES[family]).to(dtype)
    with torch.inference_mode():
        before = functional.log_softmax(model(input_ids=IDS).logits[0].float(), -1)

    shift = quantize_linears(model, IDS, int8_linear)

    left = [each for each in model.modules() if type(each) in {nn.Linear, Conv1D}]
    assert [model.get_output_embeddings()] == left
    with torch.inference_mode():
        after = functional.log_softmax(model(input_ids=IDS).logits[0].float(), -1)
    likeliest = before.argmax(-1, keepdim=True)
    expected = (after.gather(-1, likeliest) - before.gather(-1, likeliest)).abs().mean()
    assert 0 < shift == pytest.approx(float(expected), rel=1e-3)
    assert shift < 1


@pytest.mark.parametrize("family", ["llama", "phi", "opt", "gpt2"])
def test_rounded_weights_change_less_than_integers_do(family: str) -> None:
    """All layers but the last have weights that int8 represents then, and are otherwise what they were."""
    model, other = make(FAMILIES[family]), make(FAMILIES[family])

    shift = quantize_linears(model, IDS, round_to_int8)

    assert 0 < shift < quantize_linears(other, IDS, int8_linear)
    assert not has_integer_linears(model)
    rounded = [linear for _, _, linear in linear_modules(model) if linear is not model.get_output_embeddings()]
    assert rounded
    assert all(fits_int8(linear.weight) for linear in rounded)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_close_and_a_tokens_output_is_its_own(bias: bool) -> None:
    """Bit for bit the same alone and beside a token a thousand times as large; zeros give zeros, or the bias."""
    torch.manual_seed(3)
    linear = nn.Linear(96, 40, bias=bias)
    layer, x = Int8Linear(linear), torch.randn(7, 96)
    x[3] *= 1000
    x[5] = 0

    with torch.inference_mode():
        batched, single, expected = layer(x), torch.cat([layer(row[None]) for row in x]), linear(x)

    assert torch.equal(batched, single)
    assert all((batched - expected).norm(dim=-1) <= 0.05 * expected.norm(dim=-1) + 1e-6)
    assert torch.equal(batched[5], expected[5])


def run(runner: Runner) -> dict[int, list[int]]:
    """Step until nothing is left to do; return the tokens of each request."""
    events: list[TokenEvent] = []
    while runner.busy:
        runner.step(events.extend)
    assert not [event.error for event in events if event.error]
    return {number: [t for e in events if e.id == number for t in e.token_ids] for number in {e.id for e in events}}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quantized_model_can_be_batched_in_every_type(family: str, dtype: torch.dtype) -> None:
    """The verification at load allows for what int8 adds to the type's own rounding."""
    model = make(FAMILIES[family]).to(dtype)
    quantize_linears(model, IDS, int8_linear)

    assert 2 == create_torch_runner(model, length=64, slots=2, free_bytes=10**9).cache.slots


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_beside_integers_is_native_as_always(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last-bit difference may become one step of a rounding, which is no reason to leave it to torch."""
    monkeypatch.setattr(way_timing, "MAX_WAITED", -1)  # too busy to measure: the first way that works is taken
    model = make(FAMILIES[family])
    quantize_linears(model, IDS, int8_linear)
    runner = create_torch_runner(model, length=64, slots=2, free_bytes=10**9)

    select_executor(runner, "auto")

    assert "attention" == runner.compiled


def test_a_small_context_window_suffices(tmp_path: Path) -> None:
    """The text that the effect is measured on is cut to it."""
    tokenizer = chatml_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    assert load_int8(tmp_path).logprob_shift is not None


@pytest.mark.parametrize("engine", ["batching", "serial"])
@pytest.mark.parametrize("setting", ["auto", "none"])
def test_a_quantized_model_completes_alike_alone_and_in_a_batch(folder: Path, engine: Any, setting: Any) -> None:
    spec = msgspec.structs.replace(SPEC, name=str(folder), engine=engine, compile=setting)
    runner = make_runner(load_int8(folder, compile=setting), spec)
    requests = [
        Submit(id=n, prompt_ids=tuple(range(5 + n, 25 + 2 * n)), params=SamplingParams(max_tokens=12)) for n in range(4)
    ]

    single: dict[int, list[int]] = {}
    for request in requests:
        runner.submit(request)
        single |= run(runner)
    for request in requests:
        runner.submit(msgspec.structs.replace(request, id=request.id + 10, tenant="other"))
    batched = run(runner)

    assert engine == runner.name
    assert [12] * 4 == [len(tokens) for tokens in single.values()]
    assert single == {number - 10: tokens for number, tokens in batched.items()}


def test_the_effect_is_measured_when_a_model_is_loaded(folder: Path) -> None:
    quantized, exact = load_int8(folder), load_int8(folder, quantization="none")

    assert quantized.logprob_shift is not None
    assert 0 <= quantized.logprob_shift < 1
    assert exact.logprob_shift is None
    assert quantized.parameters == exact.parameters


def no_operator(self: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("Didn't find engine for operation")


def wrong_numbers(self: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(3, 1)


@pytest.mark.usefixtures("compiler")
def test_the_native_decoder_stores_int8_weights_in_8_bits() -> None:
    """All but those of the layer that computes the logits."""
    model = make(FAMILIES["llama"])
    quantize_linears(model, IDS, round_to_int8)
    runner = create_torch_runner(model, length=64, slots=2, free_bytes=10**9)

    select_executor(runner, "auto")

    assert isinstance(runner.executor, NativeDecoderExecutor)
    assert [torch.int8] * 12 + [torch.float32] == runner.executor.weight_types


@pytest.mark.usefixtures("compiler")
def test_the_serial_runner_stores_int8_weights_in_8_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeLinear, "MIN_WEIGHTS", 0)
    loaded = load_int8(folder)

    runner = make_runner(loaded, msgspec.structs.replace(SPEC, name=str(folder), engine="serial"))

    model = loaded.pipeline.model
    linears = [each for each in model.modules() if isinstance(each, NativeLinear)]
    assert runner.compiled is None
    assert {torch.int8} == {each.packed_weight.dtype for each in linears if each is not model.get_output_embeddings()}
    assert [] == [each for each in model.modules() if type(each) is nn.Linear]


@pytest.mark.parametrize("error", ["there is no C++ compiler", "AttributeError: no such symbol"])
def test_without_native_kernels_torch_computes_in_integers(
    error: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "native_linears_unavailable", lambda: error)

    assert has_integer_linears(load_int8(folder).pipeline.model)


@pytest.mark.parametrize("how", [{"compile": "none"}, {"dtype": "bfloat16"}])
def test_torch_computes_in_integers_where_nothing_is_compiled(folder: Path, how: Any) -> None:
    """By the setting, or because the native kernels have no int8 weights in bfloat16."""
    assert has_integer_linears(load_int8(folder, **how).pipeline.model)


@pytest.mark.parametrize("broken", [no_operator, wrong_numbers])
def test_where_int8_goes_wrong_the_load_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    """A model that is to be int8 is never silently something else."""
    monkeypatch.setattr(Int8Linear, "forward", broken)

    with pytest.raises(LoadError, match="int8 is not available here: this processor"):
        load_int8(folder, compile="none")


def test_int8_is_refused_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    with pytest.raises(LoadError, match="int8 is for processors and not for cuda"):
        load_int8(folder, device="cuda")
