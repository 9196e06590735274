"""Quantized models: what a checkpoint needs that was saved quantized, and bitsandbytes for one that was not."""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import BitsAndBytesConfig

from app.worker.loading.model_files import LoadError, UnsupportedError

PACKAGES: Mapping[str, Mapping[str, str]] = {
    "awq": {"gptqmodel": "gptqmodel", "accelerate": "accelerate"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes", "accelerate": "accelerate"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "fp8": {"accelerate": "accelerate"},
    "gguf": {"gguf": "gguf"},
    "gptq": {"gptqmodel": "gptqmodel", "optimum": "optimum"},
    "hqq": {"hqq": "hqq", "accelerate": "accelerate"},
    "mxfp4": {"accelerate": "accelerate", "kernels": "kernels"},
    "torchao": {"torchao": "torchao"},
}
"""Method -> module that transformers imports for it -> package that has it.  Of other methods transformers says it."""
ON_GPU = frozenset(["bitsandbytes"])
"""Methods that are served on CUDA only."""
BITSANDBYTES = {"bitsandbytes-8bit": 8, "bitsandbytes-4bit": 4}
"""Value of `model.quantization` -> bits of a weight."""


def check_quantization(saved: Any, setting: str, device: str) -> None:
    """Check what the quantization of a model needs.

    Args:
        saved: `quantization_config` of its config.json; None where there is none.
        setting: `model.quantization`.
    Raises: UnsupportedError: a package is missing, the device is another one, or the weights are quantized already.
    """
    if isinstance(saved, Mapping):
        if setting != "none":
            raise UnsupportedError(f"its weights are quantized already, so that {setting} is not possible")
        check_method(_method(saved), device)
    elif setting == "int8" and device != "cpu":
        raise UnsupportedError(f"int8 is for processors and not for {device}; choose dtype bfloat16 or float16 there")
    elif setting in BITSANDBYTES:
        check_method("bitsandbytes", device)


def check_method(method: str, device: str) -> None:
    """Raises: UnsupportedError: a package that a method needs is missing, or it is not for this device."""
    if method in ON_GPU and device != "cuda":
        raise UnsupportedError(f"{method} is served on CUDA only, not on {device}")
    lacking = [package for module, package in PACKAGES.get(method, {}).items() if not _is_installed(module)]
    if lacking:
        names = " and ".join(lacking)
        raise UnsupportedError(f"its quantization {method} needs {names}, not installed here (pip install {names})")


def gguf_numbers(path: Path) -> int:
    """Return how many numbers the tensors of a GGUF file have together.

    Raises: UnsupportedError: the package that reads it is missing; LoadError: it is damaged.
    """
    check_method("gguf", "cpu")
    # By its name: the package is optional, and has no types.
    gguf = importlib.import_module("gguf")
    try:
        return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(str(path)).tensors)
    except Exception as error:
        raise LoadError(f"{path.name}: is damaged or incomplete ({type(error).__name__})") from error


def bitsandbytes_config(setting: str, dtype: Any) -> BitsAndBytesConfig | None:
    """Return how `model.quantization` has the weights quantized as they are loaded; None where it does not."""
    match BITSANDBYTES.get(setting):
        case 8:
            return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
        case 4:
            # Of the two 4-bit types this one fits the distribution of weights.
            options = {} if isinstance(dtype, str) else {"bnb_4bit_compute_dtype": dtype}
            return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                load_in_4bit=True, bnb_4bit_quant_type="nf4", **options
            )
        case _:
            return None


def _method(quantization: Mapping[str, Any]) -> str:
    """Return the method's name; the older form of bitsandbytes names none."""
    return str(quantization.get("quant_method", "bitsandbytes"))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
