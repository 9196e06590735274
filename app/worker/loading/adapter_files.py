"""The files of a LoRA adapter in PEFT's format, checked before anything of them reaches the model.

Decides what an adapter may be: low-rank products of linear layers that the model has, in safetensors, and nothing that
would change another part of it.  What a configuration says of the base model is never followed.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from app.worker.execution.linear_modules import LinearShape
from app.worker.execution.lora import LoraAdapter, LoraWeights
from app.worker.loading.model_files import LoadError, one_line, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IGNORED = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision"),  # `_check_base`
        *("exclude_modules", "layers_pattern", "layers_to_transform", "rank_pattern", "target_modules"),
        *("eva_config", "fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_core", "peft_version"),
        *("qalora_group_size", "runtime_config"),
    }
)
"""Fields that say how the adapter was trained, or what the tensors themselves say: their names and their shapes."""
PLAIN_INITIALIZATIONS = frozenset(["gaussian", "orthogonal", "eva"])
"""Ways to begin a training that leave the model's own weights alone; the others are relative to changed ones."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NARROW_DTYPES = (torch.bfloat16, torch.float16)
ALIGNMENT = 64
"""Bytes; where each tensor begins in the adapter's memory."""
MAX_NAME_CHARS = 120
"""Of a name from a file in a message."""
_TENSOR = re.compile(r"base_model\.model\.(?P<path>[\w.]+)\.lora_(?P<half>[AB])\.weight")
_MODULE = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """The model that adapters are for."""

    linears: Mapping[str, LinearShape]
    dtype: torch.dtype
    device: str


@dataclass(frozen=True, slots=True)
class _Config:
    """What an adapter's configuration decides."""

    rank: int
    """Of every layer without one of its own."""
    has_own_ranks: bool
    alpha: float
    alphas: Mapping[str, float]
    """Of layers whose path is, or ends with, these names."""
    is_rank_stabilized: bool

    def scale(self, path: str, rank: int) -> float:
        """Return the factor of a layer's product; rank-stabilized, it falls with the root of the rank."""
        names = (name for name in self.alphas if path == name or path.endswith(f".{name}"))
        alpha = next((self.alphas[name] for name in names), self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)


def read_adapter(
    config_file: Path, weights_file: Path, target: AdapterTarget, *, max_rank: int
) -> tuple[LoraAdapter, str | None]:
    """Read an adapter, and the name of the model that its configuration says it was made for.

    Raises: LoadError: it is none that this service applies, or none of this model; the message names the file.
    """
    content = read_json(config_file)
    config = _read_config(content)
    try:
        data = weights_file.read_bytes()
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise LoadError(f"{WEIGHTS}: is damaged or incomplete ({one_line(error, MAX_NAME_CHARS)})") from None
    except OSError as error:
        raise LoadError(f"{WEIGHTS}: cannot be read ({error.strerror})") from None
    digest = sha256(json.dumps(content, sort_keys=True).encode())
    digest.update(data)  # without a copy, which would hold up the other threads
    pairs = _pairs(tensors)
    for path, (down, up) in pairs.items():
        _check_shapes(path, down, up, target.linears, config, max_rank)
    layers = {path: LoraWeights(down, up.T, config.scale(path, len(down))) for path, (down, up) in pairs.items()}
    adapter = LoraAdapter(digest.hexdigest(), _in_one_buffer(layers, target))
    _check_finite(adapter, target.dtype)
    return adapter, content.get("base_model_name_or_path")


def _read_config(content: Mapping[str, Any]) -> _Config:
    """Check every field of a configuration: what is not known to be harmless must be empty.

    Raises: LoadError: the adapter is of another kind, or needs what this service does not do; the field is named.
    """
    if content.get("peft_type") != "LORA":
        raise _refused("peft_type must be LORA; other kinds of adapters are not supported")
    if content.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refused("task_type must be CAUSAL_LM")
    _check_base(content)
    if content.get("bias", "none") != "none":
        raise _refused("bias is not supported: it would change the model's own biases")
    initialization = content.get("init_lora_weights", True)
    if not isinstance(initialization, bool | None) and initialization not in PLAIN_INITIALIZATIONS:
        raise _refused("init_lora_weights names a way to begin that changes the model's own weights")
    known = {"peft_type", "task_type", "bias", "init_lora_weights", "r", "lora_alpha", "alpha_pattern", "use_rslora"}
    for name, value in content.items():
        if name not in known | IGNORED and value not in (None, False, [], {}):
            raise _refused(f"{one_line(name, MAX_NAME_CHARS)} is not supported")
    stabilized = content.get("use_rslora", False)
    if not isinstance(stabilized, bool):
        raise _refused("use_rslora must be true or false")
    rank = content.get("r")
    if type(rank) is not int or rank < 1:
        raise _refused("r must be a whole number above 0")
    return _Config(
        rank=rank,
        has_own_ranks=bool(content.get("rank_pattern")),
        alpha=_number(content.get("lora_alpha"), "lora_alpha"),
        alphas=_alphas(content.get("alpha_pattern") or {}),
        is_rank_stabilized=stabilized,
    )


def _check_base(content: Mapping[str, Any]) -> None:
    """Raises: LoadError: the configuration tries to choose the code or the files of the base model."""
    base, mapping = content.get("base_model_name_or_path"), content.get("auto_mapping")
    if not isinstance(base, str | None):
        raise _refused("base_model_name_or_path must be a text")
    if mapping is None:
        return
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if not isinstance(library, str) or not re.fullmatch(r"transformers(\.\w+)*", library):
        raise _refused("auto_mapping names code that is not of transformers; the base model is never chosen by it")


def _alphas(patterns: Any) -> dict[str, float]:
    """Raises: LoadError: a pattern is an expression; PEFT would match it with every layer's path."""
    if not isinstance(patterns, dict) or not all(_MODULE.fullmatch(name) for name in patterns):
        raise _refused("alpha_pattern must be an object with the names of layers; expressions are not supported")
    return {name: _number(value, "alpha_pattern") for name, value in patterns.items()}


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e6:
        raise _refused(f"{name} must be a number")
    return float(value)


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return both halves of each layer's product, by its path.

    Raises: LoadError: a tensor is something else, or has no other half.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise LoadError(f"{WEIGHTS}: {one_line(name, MAX_NAME_CHARS)} is not the weight of a linear layer's LoRA")
        if tensor.dtype not in DTYPES:
            raise LoadError(f"{WEIGHTS}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}")
        halves.setdefault(found["path"], {})[found["half"]] = tensor
    if not halves:
        raise LoadError(f"{WEIGHTS}: holds no tensors")
    for path, each in halves.items():
        if len(each) < 2:
            raise LoadError(f"{WEIGHTS}: {path} has only one of lora_A and lora_B")
    return {path: (each["A"], each["B"]) for path, each in halves.items()}


def _check_shapes(
    path: str, down: Tensor, up: Tensor, linears: Mapping[str, LinearShape], config: _Config, max_rank: int
) -> None:
    """Raises: LoadError: the model has no such layer, or one of another size; or the rank is not the expected one."""
    if path not in linears:
        raise LoadError(f"{WEIGHTS}: {path} is no linear layer of this model that can have an adapter")
    inputs, outputs = linears[path]
    shapes = tuple(down.shape), tuple(up.shape)
    rank = shapes[0][0] if shapes[0] else 0
    if shapes != ((rank, inputs), (outputs, rank)):
        raise LoadError(
            f"{WEIGHTS}: {path} has {_shape(down)} and {_shape(up)}, but in this model it is "
            f"{outputs} x {inputs}; the adapter belongs to another model"
        )
    if rank < 1 or (rank != config.rank and not config.has_own_ranks):
        raise LoadError(f"{WEIGHTS}: {path} has rank {rank}, but r of {CONFIG} is {config.rank}")
    if rank > max_rank:
        raise LoadError(f"{WEIGHTS}: {path} has rank {rank}; at most {max_rank} is allowed (adapters.max_rank)")


def _in_one_buffer(layers: Mapping[str, LoraWeights], target: AdapterTarget) -> dict[str, LoraWeights]:
    """Copy all weights into one piece of memory, which goes back to the system as a whole."""
    dtypes = {path: _stored_dtype(weights, target) for path, weights in layers.items()}
    sizes = [-(-half.numel() * dtypes[path].itemsize // ALIGNMENT) * ALIGNMENT for path, half in _halves(layers)]
    parts = iter(torch.split(torch.empty(sum(sizes), dtype=torch.uint8, device=target.device), sizes))

    def copied(half: Tensor, dtype: torch.dtype) -> Tensor:
        return next(parts)[: half.numel() * dtype.itemsize].view(dtype).view(half.shape).copy_(half)

    return {
        path: LoraWeights(copied(down, dtypes[path]), copied(up, dtypes[path]), scale)
        for path, (down, up, scale) in layers.items()
    }


def _halves(layers: Mapping[str, LoraWeights]) -> Iterator[tuple[str, Tensor]]:
    for path, (down, up, _) in layers.items():
        yield path, down
        yield path, up


def _stored_dtype(weights: LoraWeights, target: AdapterTarget) -> torch.dtype:
    """Return one of 16 bits that holds every number of a layer, else the model's.

    On a GPU it is always the model's: products there are of one type.
    """
    if target.device != "cpu":
        return target.dtype
    halves = weights.down, weights.up
    return next((dtype for dtype in NARROW_DTYPES if all(_holds(dtype, half) for half in halves)), target.dtype)


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    return tensor.dtype == dtype or torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _check_finite(adapter: LoraAdapter, dtype: torch.dtype) -> None:
    """Raises: LoadError: a number is none, or has none in the model's type once it is scaled."""
    for path, (down, up, scale) in adapter.layers.items():
        if not (down.isfinite().all() and (up.float() * scale).to(dtype).isfinite().all()):
            raise LoadError(f"{WEIGHTS}: {path} holds a number that is not finite")


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _refused(reason: str) -> LoadError:
    return LoadError(f"{CONFIG}: {reason}")
