"""The proof that packed batches give a model's own logits.

Whatever a packed batch can get wrong (positions, masks, heads, windows, what one token does to others) it gets wrong
in every type.  So that is proved in float32, where rounding stays far below any such mistake however deep the model is.
In 16 bits rounding alone can move the logits of a deep model by more than a mistake would: there they may be as far
from the model's own as those are from exact ones, and not much farther.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from app.worker.execution.base import UnsupportedModelError
from app.worker.execution.float32_mode import Float32Mode, largest_weight_bytes
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.model_runner import REFERENCE_TOKENS, ModelRunner, allowed_error, relative_error
from app.worker.execution.packed_batch import Segment
from app.worker.execution.torch.attention import TorchAttention
from app.worker.execution.torch.int8_linear import float_linears, has_integer_linears
from app.worker.execution.transformers_forward import TransformersForward

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far packed logits may be from the ordinary ones in any case, as a share of their norm."""


class PackedBatchCheck(NamedTuple):
    """The result of the check that a model computes packed batches as it computes one prompt at a time."""

    bytes_per_token: int
    """The size of one token's keys and values in all layers."""
    noise: float
    """How far rounding moves its logits, as a share of their norm; 0 where the tolerances are above that."""


def torch_runner(model: Any, *, slots: int, length: int, noise: float = 0) -> ModelRunner:
    """Return a runner for a model that is known to support packed batches."""
    cache = KVCache(slots, length, str(model.device), TorchAttention())
    return ModelRunner(model, cache, TransformersForward(model, cache), noise=noise)


@torch.inference_mode()
def verify_packed_batches(model: Any, length: int, free_bytes: int) -> PackedBatchCheck:
    """Compare logits computed in chunks, beside a neighbour, with those of an ordinary forward pass.

    Args:
        length: tokens that fit the model.
        free_bytes: memory that may be taken for it.
    Raises: UnsupportedModelError: they differ.
    """
    tokens = min(length, REFERENCE_TOKENS)
    vocab_size = model.get_input_embeddings().num_embeddings
    ids, neighbour = torch.randint(vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    expected = _ordinary_logits(model, [ids])
    if model.dtype == torch.float32 and not has_integer_linears(model):
        noise = 0.0
    elif (exact := _exact_logits(model, ids, free_bytes)) is not None:
        noise = relative_error(expected, exact)
        # Whoever else rounds activations does it here, too.
        _verify_exactly(model, ids, neighbour, exact, noise if _is_quantized(model) else 0)
    else:
        noise = relative_error(_ordinary_logits(model, [ids, neighbour]), expected)
    runner = torch_runner(model, slots=3, length=tokens)
    found = _packed_logits(runner, ids, neighbour)
    _check_windows(model.config.get_text_config(decoder=True), runner.cache)
    _check(found, expected, allowed_error(TOLERANCE.get(model.dtype, 0), noise))
    return PackedBatchCheck(runner.cache.bytes_per_token, noise)


def _exact_logits(model: Any, ids: list[int], free_bytes: int) -> Tensor | None:
    """Return the logits of an ordinary pass in float32; None where there is no memory or no operator for it."""
    if largest_weight_bytes(model) > free_bytes:
        return None
    try:
        with _float32(model):
            return _ordinary_logits(model, [ids])
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001  # kernels of quantized weights refuse in any way
        log.info("its logits in float32 are not known: %s: %s", type(error).__name__, error)
        return None


def _verify_exactly(model: Any, ids: list[int], neighbour: list[int], exact: Tensor, noise: float) -> None:
    """Raises: UnsupportedModelError: the logits of packed batches differ in float32."""
    with _float32(model):
        found = _packed_logits(torch_runner(model, slots=3, length=len(ids)), ids, neighbour)
    _check(found, exact, allowed_error(TOLERANCE[torch.float32], noise))


@contextmanager
def _float32(model: Any) -> Iterator[None]:
    """Compute in float32 whatever the weights are."""
    with Float32Mode(), float_linears(model):
        yield


def _ordinary_logits(model: Any, rows: list[list[int]]) -> Tensor:
    """Return the logits after the last three tokens of the first row."""
    # The implementation that supports every feature of every model; the others drop some of them in silence.
    model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=torch.tensor(rows, device=model.device), use_cache=False).logits[0, -3:]
    return logits.float()


def _packed_logits(runner: ModelRunner, ids: list[int], neighbour: list[int]) -> Tensor:
    """Return the same of `ids` in a slot of its own: two chunks of the prompt, then a token, beside a neighbour's."""
    cut, last = len(ids) // 2, len(ids) - 1
    runner.forward([Segment(0, 0, neighbour[:-2]), Segment(2, 0, ids[:cut])], [False, False])
    mixed = [Segment(0, last - 1, neighbour[-2:-1]), Segment(2, cut, ids[cut:-1])]
    decodes = [Segment(0, last, neighbour[-1:]), Segment(2, last, ids[-1:])]
    return torch.cat([runner.forward(mixed, [False, 2]), runner.forward(decodes, [False, True])]).float()


def _check(found: Tensor, expected: Tensor, allowed: float) -> None:
    """Raises: UnsupportedModelError: logits are farther apart than allowed, or not finite."""
    difference = relative_error(found, expected)
    if not difference <= allowed:
        raise UnsupportedModelError(f"its logits differ by {difference:.1%} when they are computed in a packed batch")


def _is_quantized(model: Any) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _check_windows(config: Any, cache: KVCache) -> None:
    """Raises: UnsupportedModelError: a layer has a sliding window that its attention function is not handed."""
    windows = {layer: spec.sliding_window for layer, spec in cache.specs.items()}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * len(windows)
    for layer, window in windows.items():
        if (kinds[layer] == "sliding_attention") != (window is not None):
            raise UnsupportedModelError("its attention function is not handed its sliding windows")
