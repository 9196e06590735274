"""All decoder layers of Llama and its relatives in one call of a native kernel library (llama_forward.cpp).

With few tokens a step of torch's is mostly the overhead of a thousand operators; here it is one call, and takes as long
as reading the weights.  Decides which model families are supported; `executor_selection.py` verifies the results.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from app.worker.execution.kv_cache import KVCache
from app.worker.execution.lora import LoraAdapter
from app.worker.execution.native.adapter_weights import LINEARS, AdapterWeights, LoraLayerStruct, LoraWeightsStruct
from app.worker.execution.native.attention import KV_CACHE_TYPES, LANES, common_shape
from app.worker.execution.native.decoder_weights import DecoderWeights, LayerWeights
from app.worker.execution.native.native_build import CompileError, build_kernel_library
from app.worker.execution.native.packed_linear import NR, GemmKernel, NativeLinear, gemm_kernels
from app.worker.execution.packed_batch import PackedBatch

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Supported `model_type`s: the same layers, with or without biases, norms of heads and sliding windows."""
ACTIVATIONS = frozenset({"silu", "swish"})
"""Two names of the same function."""
WEIGHT_TYPES = {torch.int8: "int8_t", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float"}
"""Types of packed weights, and what the C++ sources call them."""


class _PackedWeights(ctypes.Structure):
    """Mirrors `PackedWeights` (gemm_packed.h)."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("panels", "scales", "bias")]


class _DecoderLayer(ctypes.Structure):
    """Mirrors `DecoderLayer`."""

    _fields_ = [
        ("attention_norm", ctypes.c_void_p),
        ("qkv", _PackedWeights),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("o", _PackedWeights),
        ("mlp_norm", ctypes.c_void_p),
        ("gate_up", _PackedWeights),
        ("down", _PackedWeights),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("sliding_window", ctypes.c_int64),
    ]


class _DecoderModel(ctypes.Structure):
    """Mirrors `DecoderModel`."""

    _fields_ = [
        ("layers", ctypes.POINTER(_DecoderLayer)),
        ("num_layers", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("intermediate_size", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("final_norm", ctypes.c_void_p),
        ("lm_head", _PackedWeights),
        ("rms_norm_eps", ctypes.c_float),
        ("softmax_scale", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
    ]


class _ForwardBatch(ctypes.Structure):
    """Mirrors `ForwardBatch`."""

    _fields_ = [
        ("num_tokens", ctypes.c_int64),
        ("hidden_states", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("logits_indices", ctypes.c_void_p),
        ("num_logits", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
        ("adapter_rank", ctypes.c_int64),
    ]


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "packed_weights": _PackedWeights,
    "decoder_layer": _DecoderLayer,
    "decoder_model": _DecoderModel,
    "lora_weights": LoraWeightsStruct,
    "lora_layer": LoraLayerStruct,
    "forward_batch": _ForwardBatch,
}
"""The structures of the bindings, by the name under which the library exports the layout of its own."""


def check_supported(model: Any) -> None:
    """Check a model whose weights are not packed yet.

    Raises: CompileError: the kernels do not support its layers.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise CompileError(f"{config.model_type} has layers of another kind")
    if model.dtype not in KV_CACHE_TYPES or config.hidden_act not in ACTIVATIONS:
        raise CompileError(f"there are none in {str(model.dtype).removeprefix('torch.')} with {config.hidden_act}")
    if config.hidden_size % LANES or config.intermediate_size % NR:
        raise CompileError(f"sizes of {config.hidden_size} and {config.intermediate_size} do not fill vectors")
    if any(type(each) is not nn.Linear for layer in model.model.layers for each in _linears(layer)):
        raise CompileError("its linear layers are quantized")


class NativeDecoder:
    """Computes all decoder layers of one model over one KV cache."""

    def __init__(self, model: Any, cache: KVCache, weights: DecoderWeights, *, kernel: GemmKernel = "panels") -> None:
        """Build the library and collect the addresses of all weights.

        Args:
            model: has passed `check_supported`; computes embeddings and rotary positions.
            cache: has been written by a forward pass of the model.
            weights: of the model's linear layers.
            kernel: computes their products.

        Raises: CompileError: its weights are of two types, the library cannot be built, or there is no such kernel.
        """
        self._body, head = model.model, weights.lm_head
        shape = common_shape(cache)
        attention, norm = self._body.layers[0].self_attn, self._body.norm
        self._referenced: list[Any] = [model, head]
        """Objects whose memory the library holds pointers to."""
        table = [self._layer(index, weights.layers[index], cache) for index in range(len(self._body.layers))]
        kinds = {linear.packed_weight.dtype for layer in weights.layers for linear in layer}
        if len(kinds) > 1:
            raise CompileError("its weights are not all of one type")
        if kernel not in gemm_kernels().kernels:
            raise CompileError(f"there are no {kernel} on this machine")
        types = {
            "LLMK_WEIGHT_TYPE": WEIGHT_TYPES[kinds.pop()],
            "LLMK_LM_HEAD_TYPE": WEIGHT_TYPES[head.packed_weight.dtype],
        }
        self._library = build_kernel_library("llama_forward", {**shape.macros, **types}, STRUCTURES)
        self._library.llmk_workspace_size.restype = ctypes.c_int64
        self._library.llmk_forward.restype = None
        self._model = _DecoderModel(
            layers=(_DecoderLayer * len(table))(*table),
            num_layers=len(table),
            hidden_size=head.in_features,
            intermediate_size=weights.layers[0].down.in_features,
            vocab_size=head.out_features,
            length=cache.length,
            final_norm=self._floats(norm.weight),
            lm_head=self._weights(head),
            rms_norm_eps=norm.variance_epsilon,
            softmax_scale=attention.scaling,
            num_threads=torch.get_num_threads(),
            tiles=kernel == "tiles",
        )
        self._workspace_size: int = self._library.llmk_workspace_size(ctypes.byref(self._model))
        """Floats for each token."""
        self._workspace = torch.empty(0)
        self._adapters: dict[LoraAdapter, AdapterWeights] = {}
        """Those that a batch has had."""

    def forward(self, batch: PackedBatch) -> Tensor:
        """Compute a forward pass and return the logits of the wanted tokens, (wanted, vocabulary) float32."""
        count, logits_indices = batch.size, batch.logit_indices
        hidden_states = self._body.embed_tokens(batch.token_ids).float()
        cos, sin = self._body.rotary_emb(hidden_states, batch.positions)
        if len(self._workspace) < count * self._workspace_size:
            self._workspace = torch.empty(count * self._workspace_size)
        logits = torch.empty(len(logits_indices), self._model.vocab_size)
        arguments = _ForwardBatch(
            num_tokens=count,
            hidden_states=hidden_states.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            slots=batch.slots.data_ptr(),
            positions=batch.positions.data_ptr(),
            logits_indices=logits_indices.data_ptr(),
            num_logits=len(logits_indices),
            logits=logits.data_ptr(),
            workspace=self._workspace.data_ptr(),
        )
        if batch.adapters:
            adapters = [self._adapter(span.adapter) for span in batch.adapters]
            pointers = (ctypes.c_void_p * count)()
            for (begin, end, _), adapter in zip(batch.adapters, adapters, strict=True):
                pointers[begin:end] = [adapter.address] * (end - begin)
            arguments.adapters = ctypes.addressof(pointers)
            arguments.adapter_rank = max(adapter.rank for adapter in adapters)
        self._library.llmk_forward(ctypes.byref(self._model), ctypes.byref(arguments))
        return logits

    def forget_adapter(self, adapter: LoraAdapter) -> None:
        """Let go of an adapter's weights."""
        self._adapters.pop(adapter, None)

    def _adapter(self, adapter: LoraAdapter) -> AdapterWeights:
        if adapter not in self._adapters:
            self._adapters[adapter] = AdapterWeights(adapter, len(self._body.layers))
        return self._adapters[adapter]

    def _layer(self, index: int, weights: LayerWeights, cache: KVCache) -> _DecoderLayer:
        layer = self._body.layers[index]
        attention = layer.self_attn
        keys, values = cache.layer(index)
        return _DecoderLayer(
            attention_norm=self._floats(layer.input_layernorm.weight),
            qkv=self._weights(weights.qkv),
            q_norm=self._floats(getattr(getattr(attention, "q_norm", None), "weight", None)),
            k_norm=self._floats(getattr(getattr(attention, "k_norm", None), "weight", None)),
            o=self._weights(weights.o),
            mlp_norm=self._floats(layer.post_attention_layernorm.weight),
            gate_up=self._weights(weights.gate_up),
            down=self._weights(weights.down),
            keys=self._pointer(keys),
            values=self._pointer(values),
            sliding_window=cache.specs[index].sliding_window or 0,
        )

    def _weights(self, linear: NativeLinear) -> _PackedWeights:
        self._referenced.append(linear)
        return _PackedWeights(*map(self._pointer, (linear.packed_weight, linear.scales, linear.bias)))

    def _floats(self, weight: Tensor | None) -> int | None:
        return self._pointer(None if weight is None else weight.detach().float())

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._referenced.append(tensor)
        return tensor.data_ptr()


def _linears(layer: Any) -> list[nn.Module]:
    return [layer.get_submodule(name) for name in LINEARS.values()]
