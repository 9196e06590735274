"""The compiled way: a model's decoder layers through torch.compile, with attention as an opaque operator.

On a GPU a step of few tokens is many tiny kernels; compiled, those between two matrix products are one.  The layers of
a model share their code, so that one of each kind is compiled, once for a single token and once for any number.
Attention reads another set of slots in every step and stays outside, behind an operator that the compiler does not look
into.  Packed linear layers are not compiled: those are a CPU's, where compiling gained nothing
(docs/benchmarks/log.md).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from app.ipc.messages import Compiled
from app.worker.execution import private_api
from app.worker.execution.base import Executor, ExecutorUnavailableError
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.lora import LoraAdapter
from app.worker.execution.packed_batch import PackedBatch

ATTENTION = "compiled kv cache slots"
"""The name under which transformers knows the attention function that calls the operator."""

_cache_ids = count()
_caches: WeakValueDictionary[int, KVCache] = WeakValueDictionary()
"""The caches of compiled models, by the number that their layers pass to the operator."""


class TorchCompileExecutor:
    """Runs another executor, whose model has compiled decoder layers."""

    compiled: Compiled | None = "layers"

    def __init__(
        self, inner: Executor, model: Any, cache: KVCache, *, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        """Args: backend: what torch compiles with."""
        self._inner = inner
        self._model = model
        self._cache = cache
        self._backend = backend
        self._attention = private_api.attention_implementation(model)
        self._layers: list[nn.Module] = []

    def install(self) -> None:
        """Have torch compile the layers when they are first called.

        Raises: ExecutorUnavailableError: the model does not say which modules are its layers.
        """
        layers = list(_decoder_layers(self._model))
        if not layers:
            raise ExecutorUnavailableError("nothing says which modules are its layers")
        cache_id = next(_cache_ids)
        _caches[cache_id] = self._cache
        for module in self._model.modules():
            if hasattr(module, "layer_idx"):
                module.kv_cache_id = cache_id
        # Layers differ in their numbers only; as constants, those would be compiled in one by one.
        private_api.treat_module_integers_as_inputs()
        self._cache.write_in_attention = True
        self._model.set_attn_implementation(ATTENTION)
        self._layers = layers
        for layer in layers:
            layer.compile(dynamic=True, backend=self._backend)

    def uninstall(self) -> None:
        """Run the layers as they were."""
        self._cache.write_in_attention = False
        self._model.set_attn_implementation(self._attention)
        for layer in self._layers:
            private_api.undo_module_compile(layer)
        self._layers = []

    def forward(self, batch: PackedBatch) -> Tensor:
        """Compute a batch and return the logits of the wanted tokens, (wanted, vocab)."""
        # Compiled code would skip what adapters add: a batch with adapters runs the layers as they were.
        with torch.compiler.set_stance("force_eager") if batch.adapters else nullcontext():
            return self._inner.forward(batch)

    def forget_adapter(self, adapter: LoraAdapter) -> None:
        """Let go of an adapter's weights."""
        self._inner.forget_adapter(adapter)


def _decoder_layers(model: Any) -> Iterator[nn.Module]:
    """Find the blocks that a model is a stack of."""
    names = private_api.decoder_layer_names(model)
    for module in model.modules():
        if type(module).__name__ in names and any(hasattr(each, "layer_idx") for each in module.modules()):
            yield module


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
    """Compute one layer's attention; called by transformers.  That the model needs nothing else was verified before."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = module.kv_cache_id, module.layer_idx
    out: Tensor = torch.ops.llm_service.attend(query, key, value, *layer, scale, sliding_window, softcap)
    return out, None


AttentionInterface.register(ATTENTION, _attend)


def _write_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache_id: int,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    cache = _caches[cache_id]
    return cache.attend(query, *cache.write(key, value, layer), scale, window, softcap)


def _output_shape(query: Tensor, key: Tensor, value: Tensor, *others: Sequence[Any]) -> Tensor:
    _, heads, tokens, _ = query.shape
    return query.new_empty(1, tokens, heads, value.shape[-1])


_OPERATOR = "llm_service::attend"
torch.library.define(
    _OPERATOR,
    "(Tensor query, Tensor key, Tensor value, SymInt cache_id, SymInt layer, float scale, SymInt? window,"
    " float? softcap) -> Tensor",
)
torch.library.impl(_OPERATOR, "CompositeExplicitAutograd", _write_and_attend)
torch.library.register_fake(_OPERATOR, _output_shape)
