"""Float32 arithmetic for a model whose weights have 16 bits, without a second model in memory.

While the mode is on, torch is handed every number of 16 bits as float32: a weight is converted where it is used, those
of linear layers one after the other in the same memory, so that the largest single weight is what it takes.  Quantized
weights stay what they are.
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
PRODUCT = "linear"
"""The function that reads nearly all weights, each as its second argument, and returns no part of one."""


class Float32Mode(TorchFunctionMode):
    """Lets torch compute in float32 wherever a model computes in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = torch.empty(0)

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
        if name == PRODUCT and len(args) > 1 and args[1].dtype in HALVES:
            args = args[0], self._converted(args[1]), *args[2:]
        if name != LOOKUP:
            args, named = _widened(args), {key: _widened(value) for key, value in named.items()}
        return _widened(func(*args, **named))

    def _converted(self, weight: Tensor) -> Tensor:
        """Return a weight in memory that the next one takes: fresh memory would take longer than the conversion."""
        if self._buffer.numel() < weight.numel() or self._buffer.device != weight.device:
            self._buffer = torch.empty(weight.numel(), dtype=torch.float32, device=weight.device)
        return self._buffer[: weight.numel()].view(weight.shape).copy_(weight)


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
