"""The native ways of execution: all decoder layers in one call, or native operators in the model's own forward pass."""

from typing import Any

import torch
from torch import Tensor

from app.ipc.messages import Compiled
from app.worker.execution.base import AttentionBackend, OptionalExecutor
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.linear_modules import replace_linears
from app.worker.execution.lora import LoraAdapter
from app.worker.execution.native.attention import NativeAttentionBackend, common_shape
from app.worker.execution.native.decoder_weights import DecoderWeights
from app.worker.execution.native.native_decoder import NativeDecoder, check_supported
from app.worker.execution.native.packed_linear import GemmKernel, NativeLinear, gemm_kernels
from app.worker.execution.packed_batch import PackedBatch


class NativeDecoderExecutor:
    """Computes Llama and its relatives in one call of a kernel library."""

    compiled: Compiled | None = "layers"

    def __init__(
        self, model: Any, cache: KVCache, weights: DecoderWeights | None = None, *, kernel: GemmKernel = "panels"
    ) -> None:
        """Args:
        cache: has been written by a forward pass of the model.
        weights: of the model, if executors share them.
        kernel: computes the products of the linear layers.
        """
        self._model = model
        self._cache = cache
        self._kernel: GemmKernel = kernel
        self._weights = weights or DecoderWeights(model)
        self._packed = False
        self._decoder: NativeDecoder | None = None

    @property
    def weight_types(self) -> list[torch.dtype]:
        """The types that the packed weights are stored in, the product that computes the logits last."""
        layers = [linear.packed_weight.dtype for layer in self._weights.layers for linear in layer]
        return [*layers, self._weights.lm_head.packed_weight.dtype] if layers else []

    def install(self) -> None:
        """Pack the model's weights and build the library.

        Raises: CompileError: its layers are of another kind, or the library cannot be built.
        """
        check_supported(self._model)
        gemm_kernels()
        self._packed = True
        self._weights.pack()
        self._decoder = NativeDecoder(self._model, self._cache, self._weights, kernel=self._kernel)

    def uninstall(self) -> None:
        """Give the model its weights back, if no other executor has them."""
        self._decoder = None
        if self._packed:
            self._packed = False
            self._weights.restore()

    def forward(self, batch: PackedBatch) -> Tensor:
        """Compute a batch and return the logits of the wanted tokens, (wanted, vocab)."""
        if self._decoder is None:
            raise RuntimeError("the native decoder is not installed")
        return self._decoder.forward(batch)

    def forget_adapter(self, adapter: LoraAdapter) -> None:
        """Let go of an adapter's weights."""
        if self._decoder is not None:
            self._decoder.forget_adapter(adapter)


class NativeAttentionExecutor:
    """Runs another executor with native attention over the KV cache."""

    compiled: Compiled | None = "attention"

    def __init__(self, inner: OptionalExecutor, cache: KVCache) -> None:
        """Args: cache: has been written by a forward pass of the model."""
        self._inner = inner
        self._cache = cache
        self._attention: AttentionBackend | None = None

    def install(self) -> None:
        """Install the other executor, and build the kernels for the model's heads.

        Raises: CompileError: there are none for such heads, or they cannot be built.  Whatever the other one raises.
        """
        self._inner.install()
        self._attention = NativeAttentionBackend(common_shape(self._cache))

    def uninstall(self) -> None:
        """Let go of the kernels; the other executor remains."""
        self._attention = None

    def forward(self, batch: PackedBatch) -> Tensor:
        """Compute a batch and return the logits of the wanted tokens, (wanted, vocab)."""
        if self._attention is None:
            raise RuntimeError("native attention is not installed")
        replaced, self._cache.attention = self._cache.attention, self._attention
        try:
            return self._inner.forward(batch)
        finally:
            self._cache.attention = replaced

    def forget_adapter(self, adapter: LoraAdapter) -> None:
        """Let go of an adapter's weights."""
        self._inner.forget_adapter(adapter)


def pack_native_linears(model: Any) -> int:
    """Replace a model's larger linear layers by native ones, each verified; returns how many."""
    return replace_linears(model, NativeLinear, min_weights=NativeLinear.MIN_WEIGHTS)
