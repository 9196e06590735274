"""Reads the layout of sentence-transformers: which modules a model has, and what each of their folders says.

A folder without `modules.json` is a plain model: its vectors are the mean of its tokens', not normalized.  Decides
which modules are supported; reads the weights of projections and no others.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from app.worker.embedding.pooling import POOLING, Head, Projection, normalize
from app.worker.loading.model_files import LoadError, one_line, read_json, read_json_objects

log = logging.getLogger(__name__)

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""The module's configuration, whose name once depended on the family of models."""
LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of older releases -> pooling."""
ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU)
}
MAX_PROMPTS, MAX_PROMPT_CHARS = 64, 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceModules:
    """How a folder's model embeds texts."""

    transformer: Path
    """Folder of the model itself and its tokenizer."""
    head: Head
    max_tokens: int | None = None
    """Of the longest text; None leaves that to the model and its tokenizer."""
    lowercase: bool = False
    """Whether texts are lowercased before the tokenizer reads them."""
    pools_prompt: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None


def read_sentence_modules(folder: Path) -> SentenceModules:
    """Return what the files of a folder say.

    Raises: LoadError: they name a module that is not supported, or one of them is damaged.
    """
    prompts, default_prompt = _prompts(folder)
    if not (folder / MODULES).is_file():
        log.warning("it has no %s: its vectors are the mean of its tokens' and not normalized", MODULES)
        return SentenceModules(transformer=folder, head=Head(), prompts=prompts, default_prompt=default_prompt)
    first, *rest = _modules(folder)
    if first[0] != "Transformer":
        raise LoadError(f"{MODULES}: the first module is {first[0]}; only Transformer is supported")
    settings = _transformer_settings(first[1])
    pools_prompt = True
    pooling: tuple[str, ...] | None = None
    steps: list[Callable[[Tensor], Tensor]] = []
    for kind, where in rest:
        if kind == "Pooling" and pooling is None and not steps:
            pooling, pools_prompt = _pooling(where)
        elif kind == "Dense" and pooling is not None:
            steps.append(_projection(where))
        elif kind == "Normalize" and pooling is not None:
            _check_input(where, "Normalize")
            steps.append(normalize)
        elif kind != "Dropout":
            raise LoadError(f"{MODULES}: the module {kind} is not supported there")
    if pooling is None:
        raise LoadError(f"{MODULES}: there is no module Pooling")
    return SentenceModules(
        transformer=first[1],
        head=Head(pooling, tuple(steps)),
        max_tokens=_positive(settings.get("max_seq_length"), "max_seq_length"),
        lowercase=settings.get("do_lower_case") is True,
        pools_prompt=pools_prompt,
        prompts=prompts,
        default_prompt=default_prompt,
    )


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Return the name of each module's class and its folder."""
    modules: list[tuple[str, Path]] = []
    for module in read_json_objects(folder / MODULES):
        kind, path = module.get("type"), module.get("path", "")
        if not isinstance(kind, str) or not isinstance(path, str):
            raise LoadError(f"{MODULES}: each module needs a type and a path")
        where = (folder / path).resolve()
        if not where.is_relative_to(folder.resolve()):
            raise LoadError(f"{MODULES}: names a path outside of the folder")
        modules.append((one_line(kind.rpartition(".")[2], 60), where))
    if not modules:
        raise LoadError(f"{MODULES}: names no module")
    return modules


def _transformer_settings(folder: Path) -> dict[str, Any]:
    found = next((folder / name for name in TRANSFORMER_CONFIGS if (folder / name).is_file()), None)
    settings = {} if found is None else read_json(found)
    task = settings.get("transformer_task", "feature-extraction")
    if found is not None and task != "feature-extraction":
        raise LoadError(f"{found.name}: transformer_task must be feature-extraction")
    return settings


def _pooling(folder: Path) -> tuple[tuple[str, ...], bool]:
    """Return the pooling, and whether it counts the tokens of a prompt."""
    config = read_json(folder / "config.json")
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for key, name in LEGACY_POOLING.items() if config.get(key) is True] or ["mean"]
    modes = tuple(mode) if isinstance(mode, list) else (mode,)
    if not modes or any(each not in POOLING for each in modes):
        raise LoadError(f"{folder.name}/config.json: pooling_mode must be one of {', '.join(POOLING)}")
    return modes, config.get("include_prompt") is not False


def _projection(folder: Path) -> Projection:
    _check_input(folder, "Dense")
    config = read_json(folder / "config.json")
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise LoadError(f"{folder.name}/config.json: activation_function must be one of {', '.join(ACTIVATIONS)}")
    try:
        weights = load_file(folder / "model.safetensors")
        weight, bias = weights["linear.weight"], weights.get("linear.bias")
    except (OSError, KeyError, SafetensorError):
        raise LoadError(f"{folder.name}: has no weights in the safetensors format, and no other is read") from None
    linear = nn.Linear(weight.shape[-1], len(weight), bias=bias is not None)
    linear.weight = nn.Parameter(weight.to(torch.float32), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(torch.float32), requires_grad=False)
    residual = config.get("use_residual") is True
    if residual and linear.in_features != linear.out_features:
        raise LoadError(f"{folder.name}/config.json: use_residual needs as many outputs as inputs")
    return Projection(linear, ACTIVATIONS[name](), residual)


def _check_input(folder: Path, kind: str) -> None:
    """Raises: LoadError: the module works on something else than the pooled vector."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if any(config.get(f"module_{side}_name") not in (None, "sentence_embedding") for side in ("input", "output")):
        raise LoadError(f"{folder.name}/config.json: {kind} is only supported behind Pooling")


def _prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    """Return the prompts by their names, and the name of the default one."""
    config = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if config.get("model_type") not in (None, "SentenceTransformer"):
        raise LoadError(f"{SETTINGS}: model_type must be SentenceTransformer")
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or len(prompts) > MAX_PROMPTS:
        raise LoadError(f"{SETTINGS}: prompts must be an object of at most {MAX_PROMPTS} texts")
    named = {name: "" if text is None else text for name, text in prompts.items()}
    if not all(isinstance(text, str) and len(text) <= MAX_PROMPT_CHARS for text in named.values()):
        raise LoadError(f"{SETTINGS}: prompts must be texts of at most {MAX_PROMPT_CHARS} characters")
    if default is not None and default not in named:
        raise LoadError(f"{SETTINGS}: default_prompt_name is the name of no prompt")
    return named, default


def _positive(value: Any, name: str) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise LoadError(f"{name} must be a whole number above 0")
    return value
