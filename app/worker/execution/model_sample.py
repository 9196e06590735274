"""Copies of a model's modules that share its weights: a part to be measured, or a second model of other layers."""

import copy
from typing import Any

from torch import nn

from app.worker.execution import private_api

MIN_ROWS = 32
"""Outputs that a sample's output projection has at least."""


def shared_copy(module: Any) -> Any:
    """Return a copy of a tree of modules with the same weights; a module of either may be replaced on its own.

    Raises: ValueError: something has replaced the forward pass of one of its modules, and would compute the original.
    """
    if "forward" in vars(module):
        raise ValueError(f"the forward pass of a {type(module).__name__} has been replaced")
    copied = copy.copy(module)
    for name in ("_parameters", "_buffers"):
        setattr(copied, name, dict(getattr(module, name)))
    children = module._modules.items()
    copied._modules = {name: None if child is None else shared_copy(child) for name, child in children}
    return copied


def sample_model(model: Any, weights: int | None) -> tuple[Any, float]:
    """Return a model of the first layers that have so many weights, and of the same share of the logits.

    Args: weights: None takes all layers, as for a model of whose layers nothing is known.
    Returns: a copy that shares the model's weights; the factor from its times to the model's.
    Raises: ValueError: the model cannot be copied.
    """
    sample = shared_copy(model)
    place = _layers(sample)
    if place is None or weights is None:
        return sample, 1
    parent, name, layers = place
    count = min(len(layers), 1 + (weights - 1) // max(1, *(_weights(layer) for layer in layers)))
    if count < len(layers):
        setattr(parent, name, nn.ModuleList(layers[:count]))
        _shorten_head(sample, count / len(layers))
    return sample, len(layers) / count


def _layers(model: Any) -> tuple[nn.Module, str, list[nn.Module]] | None:
    """Return the list of the decoder layers with its place; None where there is not exactly one."""
    names = private_api.decoder_layer_names(model)
    found = [
        (parent, name, list(child))
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and all(type(each).__name__ in names for each in child)
    ]
    return found[0] if len(found) == 1 else None


def _weights(layer: nn.Module) -> int:
    return sum(weight.numel() for weight in layer.parameters())


def _shorten_head(model: Any, share: float) -> None:
    head: Any = model.get_output_embeddings()
    if type(head) is nn.Linear:
        shorter: Any = nn.Linear(head.in_features, max(MIN_ROWS, int(head.out_features * share)), device="meta")
        shorter.weight = _first(head.weight, shorter.out_features)
        shorter.bias = _first(head.bias, shorter.out_features)
        model.set_output_embeddings(shorter)


def _first(weight: Any, rows: int) -> Any:
    return None if weight is None else nn.Parameter(weight.detach()[:rows], requires_grad=False)
