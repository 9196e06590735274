"""Muon for the matrices of the tiny chat model, AdamW for the rest.

Muon moves a matrix along the orthogonalised direction of its momentum, and needs about half of AdamW's tokens here.
torch's own version orthogonalises in bfloat16, which processors without bfloat16 arithmetic emulate slowly; this one stays in float32.
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix by about 1, with five Newton-Schulz steps.

    Args:
        matrices: (count, rows, columns) float32.
    Returns: (count, rows, columns) float32.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.add(3.4445 * x, (-4.7750 * square + 2.0315 * square @ square) @ x)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum 0.95 with Nesterov's look-ahead, orthogonalised; the step is scaled to AdamW's usual size."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix once."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                moves = orthogonalise(torch.stack([self._direction(p) for p in parameters]))
                size = 0.2 * max(shape) ** 0.5 * group["lr"]
                for parameter, move in zip(parameters, moves, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-size)

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(parameter.grad, 0.05)
        return parameter.grad.lerp(momentum, 0.95)


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms, both at the rate `lr`."""
    inside = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    chosen = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(inside, lr, 0.05), torch.optim.AdamW(others, lr, betas=(0.9, 0.97), weight_decay=0.0)]
