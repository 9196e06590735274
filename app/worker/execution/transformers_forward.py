"""A transformers model's own forward pass over the KV cache.

Works for every model that hands its attention to transformers' `AttentionInterface` and rotates or embeds by
`position_ids`.  Linear layers and the attention backend may be replaced by other ways of execution beneath it.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface

from app.ipc.messages import Compiled
from app.worker.execution.base import UnsupportedModelError
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.lora import LoraAdapter, LoraLayers
from app.worker.execution.packed_batch import PackedBatch

ATTENTION = "kv cache slots"
"""The name under which transformers knows the attention function."""
IGNORED_TENSORS = frozenset({"position_ids", "cache_position"})
"""Tensors that attention functions are handed but do not need."""


class TransformersForward:
    """Runs the model as transformers wrote it; attention goes to the backend of the KV cache."""

    compiled: Compiled | None = None

    def __init__(self, model: Any, cache: KVCache, pack: Callable[[Any], object] | None = None) -> None:
        """Switch the model's attention to the KV cache.

        Args: pack: replaces linear layers of the model by others, each of which was verified; None leaves them.
        """
        self.model = model
        self.cache = cache
        self._lora = LoraLayers(model)
        self._pack = pack
        model.set_attn_implementation(ATTENTION)

    def install(self) -> None:
        """Replace the linear layers; may raise anything, and those that were replaced by then stay."""
        if self._pack is not None:
            self._pack(self.model)
            self._pack = None

    def uninstall(self) -> None:
        """Do nothing: layers that were replaced compute the same."""

    def forward(self, batch: PackedBatch) -> Tensor:
        """Compute a batch and return the logits of the wanted tokens, (wanted, vocab)."""
        wanted = len(batch.logit_indices)
        with self._lora.applied(batch.adapters, batch.size):
            logits: Tensor = self.model(
                input_ids=batch.token_ids,
                position_ids=batch.positions,
                past_key_values=self.cache,
                use_cache=True,
                # The logits of one token at least: some models cannot compute none.
                logits_to_keep=batch.logit_indices if wanted else 1,
            ).logits[0]
        return logits[:wanted]

    def forget_adapter(self, adapter: LoraAdapter) -> None:
        """Let go of an adapter's weights."""
        self._lora.forget(adapter)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute one layer's attention; called by transformers, in its signature.

    Raises: UnsupportedModelError: the model needs something that the backends do not compute.
    """
    unknown = sorted(name for name, each in others.items() if isinstance(each, Tensor) and name not in IGNORED_TENSORS)
    cache: KVCache | None = getattr(key, "kv_cache", None)
    if cache is None or attention_mask is not None or unknown:
        raise UnsupportedModelError(f"its attention needs {', '.join(unknown) or 'keys or a mask of its own'}")
    return cache.attend(query, key, value, scaling, sliding_window, softcap), None


AttentionInterface.register(ATTENTION, _attend)
