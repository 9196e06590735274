"""The torch way: transformers' own forward pass with torch's attention over KV cache slots.

Every other way is compared with this one, and this one with the model's ordinary forward pass when it is loaded.  What
cannot be computed as a packed batch (recurrent state, cross attention, attention with a bias of its own, positions that
depend on the longest sequence) is recognised by the configuration where that says it, and by the logits where it does
not.
"""

from typing import Any

import torch

from app.worker.execution import private_api
from app.worker.execution.base import UnsupportedModelError
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.model_runner import REFERENCE_TOKENS, ModelRunner
from app.worker.execution.packed_batch import Segment
from app.worker.execution.torch.attention import TorchAttention
from app.worker.execution.torch.int8_linear import has_integer_linears
from app.worker.execution.transformers_forward import TransformersForward

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far packed logits may be from the ordinary ones, as a share of their norm; rounding alone stays well below."""
INT8_TOLERANCE = 5e-2
"""Extra tolerance with integer arithmetic, where a rounding difference can reach 1 %."""
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest sequence in the batch, so that one sequence would change another's."""
MAX_SLOTS = 32
MIN_LENGTH = 2048
"""Tokens that a slot has in any case, if the model's context window does."""


def create_torch_runner(model: Any, *, length: int, slots: int | None, free_bytes: int) -> ModelRunner:
    """Verify that packed batches give the model's own logits, and allocate its KV cache.

    Args:
        length: tokens that fit a slot, or fewer where the memory is too small for one of this length.
        slots: sequences at once; None takes 32, or fewer where they do not fit.
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
        tolerance = TOLERANCE.get(model.dtype, 0) + (INT8_TOLERANCE if has_integer_linears(model) else 0)
        bytes_per_token = _verify_packed_batches(model, min(length, REFERENCE_TOKENS), tolerance)
    except Exception as error:
        if original is not None:
            model.set_attn_implementation(original)
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(f"its forward pass fails over KV cache slots ({type(error).__name__})") from error
    length = min(length, max(MIN_LENGTH, free_bytes // max(1, bytes_per_token)))
    fitting = max(1, free_bytes // max(1, bytes_per_token * length))
    runner = torch_runner(model, slots=min(slots or MAX_SLOTS, fitting), length=length)
    # A layer's keys and values get their memory in its first pass.
    runner.reference_logits()
    return runner


def torch_runner(model: Any, *, slots: int, length: int) -> ModelRunner:
    """Return a runner for a model that is known to support packed batches."""
    cache = KVCache(slots, length, str(model.device), TorchAttention())
    return ModelRunner(model, cache, TransformersForward(model, cache))


def _check_config(config: Any) -> None:
    """Raises: UnsupportedModelError: the configuration says that packed batches would be wrong."""
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(f"it has layers of the kind {', '.join(sorted(unknown))}")
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type") in BATCH_DEPENDENT_ROPE:
            raise UnsupportedModelError(f"its rotary positions are of the kind {each['rope_type']}")


@torch.inference_mode()
def _verify_packed_batches(model: Any, tokens: int, tolerance: float) -> int:
    """Compare logits computed in chunks, beside a neighbour, with those of an ordinary forward pass.

    Returns: the size in bytes of one token's keys and values.
    Raises: UnsupportedModelError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().num_embeddings
    ids, neighbour = torch.randint(vocab_size, (2, tokens), generator=generator).tolist()
    # The implementation that supports every feature of every model; the others drop some of them in silence.
    model.set_attn_implementation("eager")
    expected = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -3:]
    runner, cut = torch_runner(model, slots=3, length=tokens), tokens // 2
    runner.forward([Segment(0, 0, neighbour[:-3]), Segment(2, 0, ids[:cut])], [False, False])
    mixed = [Segment(0, tokens - 3, neighbour[-3:-2]), Segment(2, cut, ids[cut:-2])]
    logits = [runner.forward(mixed, [False, True])]
    for position in (tokens - 2, tokens - 1):
        decodes = [Segment(0, position, [neighbour[position]]), Segment(2, position, [ids[position]])]
        logits.append(runner.forward(decodes, [False, True]))
    windows = {layer: spec.sliding_window for layer, spec in runner.cache.specs.items()}
    _check_windows(model.config.get_text_config(decoder=True), windows)
    difference = (torch.cat(logits) - expected).float().norm() / expected.float().norm()
    if not difference <= tolerance:
        raise UnsupportedModelError(f"its logits differ by {difference:.1%} when they are computed in a packed batch")
    return runner.cache.bytes_per_token


def _check_windows(config: Any, windows: dict[int, int | None]) -> None:
    """Raises: UnsupportedModelError: a layer has a sliding window that its attention function is not handed."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * len(windows)
    for layer, window in windows.items():
        if (kinds[layer] == "sliding_attention") != (window is not None):
            raise UnsupportedModelError("its attention function is not handed its sliding windows")
