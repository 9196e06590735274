"""The torch way: transformers' own forward pass with torch's attention over KV cache slots.

Every other way is compared with this one, and this one with the model's ordinary forward pass when it is loaded.  What
cannot be computed as a packed batch (recurrent state, cross attention, attention with a bias of its own, positions that
depend on the longest sequence) is recognised by the configuration where that says it, and by the logits where it does
not.
"""

from typing import Any

from app.worker.execution import private_api
from app.worker.execution.base import UnsupportedModelError
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.torch.equivalence import torch_runner, verify_packed_batches

BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest sequence in the batch, so that one sequence would change another's."""
MAX_SLOTS, MAX_CUDA_SLOTS = 32, 128
"""On a GPU many sequences at once take little longer than one."""
MIN_LENGTH = 2048
"""Tokens that a slot has in any case, if the model's context window does."""


def create_torch_runner(model: Any, *, length: int, slots: int | None, free_bytes: int) -> ModelRunner:
    """Verify that packed batches give the model's own logits, and allocate its KV cache.

    Args:
        length: tokens that fit a slot, or fewer where the memory is too small for one of this length.
        slots: sequences at once; None takes 32, on a GPU 128, or fewer where they do not fit.
        free_bytes: memory that the KV cache may take.

    Raises:
        UnsupportedModelError: the model has to be served another way; it is left as it was.
        torch.OutOfMemoryError, MemoryError: there is no memory left for its KV cache.
    """
    original: str | None = None
    try:
        original = private_api.attention_implementation(model)
        if not private_api.can_set_attention(model):
            raise UnsupportedModelError("it computes attention of its own")
        _check_config(model.config.get_text_config(decoder=True))
        proof = verify_packed_batches(model, length, free_bytes)
    except Exception as error:
        if original is not None:
            model.set_attn_implementation(original)
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(f"its forward pass fails over KV cache slots ({type(error).__name__})") from error
    length = min(length, max(MIN_LENGTH, free_bytes // max(1, proof.bytes_per_token)))
    fitting = max(1, free_bytes // max(1, proof.bytes_per_token * length))
    most = slots or (MAX_CUDA_SLOTS if model.device.type == "cuda" else MAX_SLOTS)
    runner = torch_runner(model, slots=min(most, fitting), length=length, noise=proof.noise)
    # A layer's keys and values get their memory in its first pass.
    runner.reference_logits()
    return runner


def _check_config(config: Any) -> None:
    """Raises: UnsupportedModelError: the configuration says that packed batches would be wrong."""
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(f"it has layers of the kind {', '.join(sorted(unknown))}")
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type") in BATCH_DEPENDENT_ROPE:
            raise UnsupportedModelError(f"its rotary positions are of the kind {each['rope_type']}")
