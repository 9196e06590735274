"""Scaled dot-product attention in torch's operators, with the bounds and masks that models use."""

import torch
from torch import Tensor
from torch.nn import functional


def additive_mask(visible: Tensor, like: Tensor) -> Tensor:
    """Return 0 where a key is visible and -inf elsewhere, in the type of `like`."""
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, float("-inf"))


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, *, causal: bool
) -> Tensor:
    """Attend (batch, heads, queries, size) to (batch, heads, keys, size).

    Args:
        mask: additive; None lets each query see all keys, or those up to its own if `causal`.
        softcap: bounds the scores by `softcap * tanh(score / softcap)`; None is no bound.
    """
    if softcap is None:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        )
    scores = torch.tanh((q @ k.mT) * scale / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    elif causal:
        scores = scores + additive_mask(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), q)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v
