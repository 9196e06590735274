"""Checkpoints that were saved quantized: loaded where transformers can, else refused with what is missing."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.ipc.messages import ModelSpec
from app.worker.loading import quantized_checkpoints
from app.worker.loading.loader import load
from app.worker.loading.model_files import LoadError, UnsupportedError
from app.worker.loading.quantized_checkpoints import bitsandbytes_config, check_quantization
from app.worker.process import make_runner
from tests.unit.lying_models import change_json
from tests.unit.tiny_models import save_tiny_llama

BLOCK, LARGEST = 128, 448
"""Weights that share a scale, and the largest number of the 8-bit format."""


def load_folder(folder: Path, **fields: Any) -> Any:
    spec = ModelSpec(
        name=str(folder), source="local", device="cpu", dtype="float32", revision=None, max_model_len=None, threads=1
    )
    return load(msgspec.structs.replace(spec, compile="none", **fields), str(folder / "saved"), lambda stage: None)


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights in 8-bit floats, and the scale of each block."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scales, quantized = torch.empty(rows, columns), torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            at = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
            scales[row, column] = weight[at].abs().max() / LARGEST
            quantized[at] = (weight[at] / scales[row, column]).to(torch.float8_e4m3fn)
    return quantized, scales


def test_a_checkpoint_of_8_bit_floats_is_loaded(tmp_path: Path):
    """Without a GPU it is computed in the ordinary types: nearly the model that it was made of."""
    pytest.importorskip("accelerate")
    folder = save_tiny_llama(tmp_path, hidden_size=128, intermediate_size=256)
    plain = load_folder(folder).pipeline.model
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "proj" in name]:
        weights[name], weights[f"{name}_scale_inv"] = to_fp8(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    change_json("config.json", {"quantization_config": method})(folder)
    loaded = load_folder(folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        difference = (loaded.pipeline.model(ids).logits - plain(ids).logits).norm() / plain(ids).logits.norm()

    assert 0 < difference < 0.1
    assert "batching" == make_runner(loaded, ModelSpec(**SPEC)).name


SPEC: dict[str, Any] = {
    "name": "x",
    "source": "local",
    "device": "cpu",
    "dtype": "float32",
    "revision": None,
    "max_model_len": None,
    "threads": 1,
    "compile": "none",
}


@pytest.mark.parametrize(
    ("method", "packages"),
    [
        ("gptq", "gptqmodel and optimum"),
        ("awq", "gptqmodel and accelerate"),
        ("compressed-tensors", "compressed-tensors"),
        ("hqq", "hqq and accelerate"),
    ],
)
def test_a_method_whose_package_is_missing_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, packages: str
):
    monkeypatch.setattr(quantized_checkpoints, "_is_installed", lambda module: False)
    folder = save_tiny_llama(tmp_path)
    change_json("config.json", {"quantization_config": {"quant_method": method, "bits": 4}})(folder)
    with pytest.raises(UnsupportedError, match=f"quantization {method} needs {packages}, not installed here"):
        load_folder(folder)


@pytest.mark.parametrize("saved", [{"quant_method": "bitsandbytes"}, {"load_in_4bit": True}, None])
def test_bitsandbytes_is_for_cuda(saved: dict[str, Any] | None):
    with pytest.raises(UnsupportedError, match="bitsandbytes is served on CUDA only, not on cpu"):
        check_quantization(saved, "none" if saved else "bitsandbytes-4bit", "cpu")


def test_bitsandbytes_names_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantized_checkpoints, "_is_installed", lambda module: module != "bitsandbytes")
    with pytest.raises(UnsupportedError, match=r"needs bitsandbytes, not installed here \(pip install bitsandbytes\)"):
        check_quantization(None, "bitsandbytes-8bit", "cuda")


def test_weights_are_not_quantized_twice():
    with pytest.raises(UnsupportedError, match="quantized already"):
        check_quantization({"quant_method": "fp8"}, "int8", "cpu")


def test_the_settings_of_bitsandbytes_are_its_two_kinds():
    eight, four = (bitsandbytes_config(f"bitsandbytes-{bits}bit", torch.bfloat16) for bits in (8, 4))

    assert eight is not None
    assert four is not None
    assert (True, False) == (eight.load_in_8bit, eight.load_in_4bit)
    assert (True, "nf4", torch.bfloat16) == (
        four.load_in_4bit,
        four.bnb_4bit_quant_type,
        four.bnb_4bit_compute_dtype,
    )
    assert bitsandbytes_config("int8", torch.float32) is None


def test_a_gguf_file_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which is named; with it transformers makes ordinary weights of the file."""
    monkeypatch.setattr(quantized_checkpoints, "_is_installed", lambda module: False)
    folder = save_tiny_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    with pytest.raises(UnsupportedError, match=r"needs gguf, not installed here \(pip install gguf\)"):
        load_folder(folder)


def test_of_several_gguf_files_none_is_chosen(tmp_path: Path):
    folder = save_tiny_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    (folder / "model-Q8_0.gguf").touch()
    with pytest.raises(LoadError, match="2 GGUF files"):
        load_folder(folder)
