"""Whether the weights in memory are the ones in the files: transformers draws at random what the files lack, and drops
what the model has no place for.

Decides which differences a model may have.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from app.worker.loading.model_files import LoadError

log = logging.getLogger(__name__)

LISTED = 3
"""Names of tensors in a message."""
BUFFERS = ("inv_freq", "masked_bias", "position_ids", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of the names of tensors that older releases stored, and that are computed today."""
SHARED, PACKED = 2, 16
"""Parameters for each number in the files: tensors may be stored once for two places, or several numbers in one."""
SMALL_MODEL = 1_000_000
"""Parameters that take no time and memory worth a check."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_size(config: Any, stored: int, kind: Any = AutoModelForCausalLM) -> None:
    """Compare the model that a configuration describes with the files, before memory is taken for it.

    Args:
        stored: the numbers that the files hold; packed ones of a quantized model count as one.
        kind: class that makes a model of a configuration.
    Raises: LoadError: the model has many times as many parameters; most would be drawn at random only to be refused.
    """
    try:
        with torch.device("meta"):
            model: Any = kind.from_config(config)
            described = sum(each.numel() for each in model.parameters())
    except Exception:  # noqa: BLE001  # the load itself says better what is wrong
        return
    if described > stored * (PACKED if getattr(config, "quantization_config", None) else SHARED) + SMALL_MODEL:
        raise LoadError(
            f"config.json: describes a model of {described:,} parameters, but the weights hold {stored:,} numbers"
        )


def check_loading(model: Any, info: Mapping[str, Any], shape_of: Callable[[str], tuple[int, ...]]) -> None:
    """Check what transformers says of a load; tensors of a part that the model does not have are only logged.

    Args:
        info: `output_loading_info` of `from_pretrained`.
        shape_of: returns the shape of a tensor in the files.
    Raises: LoadError: a parameter is not in the files, has another shape there, or a tensor of a module is dropped.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        instead = f"; they hold {_listed(unexpected)} instead" if unexpected else ""
        raise LoadError(f"the weights lack {_listed(missing)}{instead}")
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        more = f" (and {len(mismatched) - 1} more differ)" if len(mismatched) > 1 else ""
        raise LoadError(f"{name} is {_shape(found)} in the weights, but {_shape(wanted)} by config.json{more}")
    modules = {name for name, _ in model.named_modules()}
    known = {_pattern(name) for name in model.state_dict()}
    dropped = [
        name
        for name in unexpected
        if (_pattern(name) in known or name.rpartition(".")[0] in modules) and not _is_buffer(name, shape_of)
    ]
    if dropped:
        raise LoadError(f"the weights hold {_listed(dropped)}, which the model that config.json describes does not use")
    if unexpected:
        log.warning("the weights hold %s, which this model does not use", _listed(unexpected))


@torch.inference_mode()
def check_finite(model: Any) -> None:
    """Raises: LoadError: a parameter holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        # Numbers of 8 bits cannot be compared; their scales, which are parameters too, can.
        if parameter.numel() and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            # One pass over the memory, many times as fast as `isfinite`; a NaN is both the least and the greatest.
            least, greatest = torch.aminmax(parameter)
            if not (least.isfinite() and greatest.isfinite()):
                raise LoadError(f"the weights hold a number that is not finite in {name}")


@torch.inference_mode()
def check_scores(model: Any, token_ids: Collection[int]) -> None:
    """Compute the logits of a short text.

    Raises: LoadError: they are not finite, or equal for all tokens.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    scores = model(input_ids=ids, use_cache=False).logits[0].float()
    highest = scores.amax(dim=-1)
    # Some models rule out tokens by -inf.
    if not highest.isfinite().all() or scores.isnan().any():
        raise LoadError("the model's scores are not finite; its weights or config.json hold a wrong number")
    if scores.shape[-1] > 1 and bool((highest == scores.amin(dim=-1)).all()):
        raise LoadError("the model's scores are equal for all tokens; its weights are empty")


def _is_buffer(name: str, shape_of: Callable[[str], tuple[int, ...]]) -> bool:
    """Return whether a tensor is a constant that older releases stored: a mask is called a bias, too."""
    return name.endswith(BUFFERS) or (name.endswith(".bias") and len(shape_of(name)) > 1)


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name)


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(list(names)[:LISTED]) + more


def _shape(shape: Collection[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
