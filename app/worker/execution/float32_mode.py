"""Float32 arithmetic for a model whose weights have 16 bits, without a second model in memory.

While the mode is on, torch is handed every number of 16 bits as float32: a weight is converted where it is used and let
go at once, so that the largest single weight is what it takes.  Quantized weights stay what they are.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HALVES = frozenset({torch.float16, torch.bfloat16})
VIEWS = frozenset(
    "__getitem__ chunk expand flatten movedim narrow permute reshape select split squeeze t transpose unbind unflatten "
    "unsqueeze view".split()
)
"""Functions whose results are converted where they are used: a part of a weight needs no copy of the whole."""
LOOKUP = "embedding"
"""The function that reads a few rows of a weight."""


class Float32Mode(TorchFunctionMode):
    """Lets torch compute in float32 wherever a model computes in 16 bits."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with float32 in place of 16 bits; called by torch, in its signature."""
        name, named = getattr(func, "__name__", ""), kwargs or {}
        if name == "__get__":
            # An attribute; the type of a weight has to be the one that it is computed in.
            found = func(*args, **named)
            return torch.float32 if isinstance(found, torch.dtype) and found in HALVES else found
        if name in VIEWS:
            return func(*args, **named)
        if name != LOOKUP:
            args, named = _widened(args), {key: _widened(value) for key, value in named.items()}
        return _widened(func(*args, **named))


def largest_weight_bytes(model: nn.Module) -> int:
    """Return how much memory the mode takes."""
    return max((4 * weight.numel() for weight in model.parameters()), default=0)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALVES else value
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALVES else value
    if type(value) in (tuple, list):
        return type(value)(_widened(each) for each in value)
    return value
