"""The choice of an executor: any error of an optional way leaves the model to torch, with its logits unchanged."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from app.ipc.messages import Compile
from app.worker.execution import executor_selection, private_api
from app.worker.execution.base import ExecutorUnavailableError, UnsupportedModelError
from app.worker.execution.compiled.torch_compile import TorchCompileExecutor
from app.worker.execution.executor_selection import install_verified, native_linears_unavailable, select_executor
from app.worker.execution.kv_cache import TorchBlockCopier
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.native.block_copier import NativeBlockCopier
from app.worker.execution.native.native_executors import NativeAttentionExecutor, NativeDecoderExecutor
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.execution.transformers_forward import TransformersForward
from tests.unit.worker.families import CONTEXT, FAMILIES, make


def runner_of(family: str = "llama", dtype: torch.dtype = torch.float32) -> ModelRunner:
    return create_torch_runner(make(FAMILIES[family]).to(dtype), length=CONTEXT, slots=2, free_bytes=10**9)


def renamed(*args: Any, **settings: Any) -> Any:
    raise AttributeError("'Model' object has no attribute 'layers'")


def no_memory(*args: Any, **settings: Any) -> Any:
    raise torch.OutOfMemoryError("no memory")


OPTIONAL = [
    (NativeDecoderExecutor, "install", "native layers"),
    (NativeDecoderExecutor, "forward", "native layers"),
    (NativeAttentionExecutor, "install", "native linears, native attention or by torch linears, native attention"),
    (NativeAttentionExecutor, "forward", "native linears, native attention or by torch linears, native attention"),
    (executor_selection, "pack_native_linears", "native linears, native attention or by native linears"),
    (executor_selection, "prepack_linears", "native linears, native attention or by native linears"),
]


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the other ways are tried."""

    def none(self: NativeDecoderExecutor) -> None:
        raise ExecutorUnavailableError("not in this test")

    monkeypatch.setattr(NativeDecoderExecutor, "install", none)


@pytest.mark.usefixtures("no_decoder")
@pytest.mark.parametrize(("owner", "name", "message"), OPTIONAL, ids=lambda value: getattr(value, "__name__", value))
def test_any_error_of_an_optional_way_leaves_the_model_to_torch(
    owner: Any, name: str, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The type and the message of the error are logged, and the logits are what they were."""
    if owner is NativeDecoderExecutor:
        monkeypatch.undo()
    runner = runner_of()
    before = runner.reference_logits()
    monkeypatch.setattr(owner, name, renamed)

    with caplog.at_level(logging.WARNING, executor_selection.__name__):
        select_executor(runner, "auto")

    assert f"not computed by {message}" in caplog.text
    assert "AttributeError: 'Model' object has no attribute 'layers'" in caplog.text
    assert not isinstance(runner.executor, owner if isinstance(owner, type) else ())
    assert (runner.reference_logits() - before).norm() <= 1e-4 * before.norm()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("fails", [False, True])
def test_the_prefix_cache_is_copied_natively_where_that_can_be_built(
    fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And by torch elsewhere, which is said."""
    runner = runner_of()
    if fails:
        monkeypatch.setattr(executor_selection, "block_copy_library", renamed)

    select_executor(runner, "auto")

    assert (TorchBlockCopier if fails else NativeBlockCopier) is runner.cache.make_block_copier
    assert fails == ("copies to the prefix cache are left to torch: AttributeError" in caplog.text)


def test_kernels_that_fail_in_any_way_are_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_selection, "gemm_kernels", renamed)

    assert "AttributeError: 'Model' object has no attribute 'layers'" == native_linears_unavailable()


def test_layers_that_were_asked_for_are_not_left_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any error becomes the reason that the operator reads; the model is restored all the same."""
    runner = runner_of()
    before = runner.reference_logits()
    monkeypatch.setattr(NativeDecoderExecutor, "forward", renamed)

    with pytest.raises(ExecutorUnavailableError, match="AttributeError: 'Model' object has no attribute 'layers'"):
        select_executor(runner, "layers")

    assert torch.equal(before, runner.reference_logits())


@pytest.mark.parametrize("setting", ["auto", "layers"])
def test_without_memory_the_load_ends(setting: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's way would need as much."""
    monkeypatch.setattr(NativeDecoderExecutor, "install", no_memory)

    with pytest.raises(torch.OutOfMemoryError):
        select_executor(runner_of(), setting)


@pytest.mark.parametrize("name", ["attention_implementation", "can_set_attention"])
def test_a_model_that_no_longer_says_how_it_attends_cannot_be_batched(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is served one request at a time; its forward pass is what it was."""
    model, ids = make(FAMILIES["llama"]), torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        monkeypatch.setattr(private_api, name, renamed)

        with pytest.raises(UnsupportedModelError, match="AttributeError"):
            create_torch_runner(model, length=CONTEXT, slots=2, free_bytes=10**9)

        assert torch.equal(before, model(input_ids=ids).logits)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_torch_compile_that_breaks_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """For instance because torch has renamed what is used of it."""
    runner = runner_of("gpt2")
    before = runner.reference_logits()
    monkeypatch.setattr(private_api, "treat_module_integers_as_inputs", renamed)

    with pytest.raises(AttributeError):
        install_verified(runner, TorchCompileExecutor(runner.executor, runner.model, runner.cache), 1e-3)

    assert runner.compiled is None
    assert torch.equal(before, runner.reference_logits())


def test_numbers_that_a_rejected_executor_wrote_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the KV cache would spoil what torch computes from then on."""
    runner = runner_of()
    before = runner.reference_logits()

    def write_nan(self: NativeAttentionExecutor) -> None:
        with torch.inference_mode():
            for index in range(3):
                for tensor in runner.cache.layer(index):
                    tensor.fill_(float("nan"))
        raise RuntimeError("it fails after that")

    monkeypatch.setattr(NativeAttentionExecutor, "install", write_nan)
    executor = NativeAttentionExecutor(TransformersForward(runner.model, runner.cache), runner.cache)
    with pytest.raises(RuntimeError):
        install_verified(runner, executor, 1e-4)

    assert torch.equal(before, runner.reference_logits())
