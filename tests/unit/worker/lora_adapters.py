"""LoRA adapters made with PEFT, and the models that PEFT makes of them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from app.worker.execution.linear_modules import linear_shapes
from app.worker.execution.lora import LoraAdapter
from app.worker.loading.adapter_files import AdapterTarget, read_adapter
from tests.unit.worker.families import make

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def save_adapter(model: Any, folder: Path, *, seed: int = 0, dtype: torch.dtype | None = None, **settings: Any) -> Path:
    """Save an adapter with random weights as PEFT does, large enough to change what the model says.

    Args:
        model: is changed by it.
        dtype: that the file stores; None leaves PEFT's.
        settings: of the configuration.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings(action="ignore"):
        adapted = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": list(ATTENTION)} | settings)
        )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.15)
    adapted.save_pretrained(str(folder))
    if dtype is not None:
        weights = folder / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights)
    return folder


def merged(model: Any, folder: Path) -> Any:
    """Return the model that PEFT makes of another one and an adapter."""
    with warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def target_of(model: Any) -> AdapterTarget:
    return AdapterTarget(linear_shapes(model), model.dtype, "cpu")


def read(folder: Path, model: Any, max_rank: int = 64) -> LoraAdapter:
    """Read an adapter as the worker does; `model` has its own linear layers still."""
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    adapter, _ = read_adapter(*files, target_of(model), max_rank=max_rank)
    return adapter


def adapted(build: Callable[[], Any], folder: Path, **settings: Any) -> tuple[LoraAdapter, Any]:
    """Return an adapter of a kind of model as the worker reads it, and the model that PEFT makes of it."""
    save_adapter(make(build), folder, **settings)
    return read(folder, make(build)), merged(make(build), folder)
