"""All decoder layers of Llama and its relatives in one call of a native kernel library (llama_forward.cpp).

With few tokens a step of torch's is mostly the overhead of a thousand operators; here it is one call, and takes as long
as reading the weights.  Decides which model families are supported; `executor_selection.py` verifies the results.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from app.worker.execution.kv_cache import RowCache
from app.worker.execution.native.attention import KV_CACHE_TYPES, LANES
from app.worker.execution.native.native_build import CompileError, build_kernel_library
from app.worker.execution.native.packed_linear import NR, NativeLinear
from app.worker.execution.packed_batch import Layout
from app.worker.execution.qkv_fusion import Part

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Supported `model_type`s: the same layers, with or without biases, norms of heads and sliding windows."""
ACTIVATIONS = frozenset({"silu", "swish"})
"""Two names of the same function."""
WEIGHT_TYPES = {torch.int8: "Byte", torch.float16: "Half", torch.bfloat16: "Bfloat", torch.float32: "float"}
"""Types of packed weights, and what the C++ sources call them."""


class _Weights(ctypes.Structure):
    """Mirrors `Weights`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("panels", "scales", "bias")]


class _Layer(ctypes.Structure):
    """Mirrors `Layer`."""

    _fields_ = [
        ("attention_norm", ctypes.c_void_p),
        ("qkv", _Weights),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("o", _Weights),
        ("mlp_norm", ctypes.c_void_p),
        ("gate_up", _Weights),
        ("down", _Weights),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    """Mirrors `Model`."""

    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_int64) for name in ("count", "hidden", "inner", "vocabulary", "length")),
        ("last_norm", ctypes.c_void_p),
        ("head", _Weights),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
    ]


class _Tokens(ctypes.Structure):
    """Mirrors `Tokens`."""

    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "cosines", "sines", "rows", "positions", "wanted")),
        ("wanted_count", ctypes.c_int64),
        ("scores", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
    ]


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

    def __init__(self, model: Any, cache: RowCache) -> None:
        """Build the library and collect the addresses of all weights.

        Args:
            model: has passed `check_supported`; its linear layers are packed.
            cache: has been written by a forward pass of the model.

        Raises: CompileError: its weights are of two types, or the library cannot be built.
        """
        self._body, head = model.model, _native(model.get_output_embeddings())
        shape = cache.same_heads()
        attention, mlp, norm = self._body.layers[0].self_attn, self._body.layers[0].mlp, self._body.norm
        self._referenced: list[Any] = [model, head]
        """Objects whose memory the library holds pointers to."""
        table = [self._layer(number, layer, cache) for number, layer in enumerate(self._body.layers)]
        linears = [each for each in self._referenced if isinstance(each, NativeLinear) and each is not head]
        kinds = {each.packed_weight.dtype for each in linears}
        if len(kinds) > 1:
            raise CompileError("its weights are not all of one type")
        types = {"WEIGHT": WEIGHT_TYPES[kinds.pop()], "HEAD": WEIGHT_TYPES[head.packed_weight.dtype]}
        self._library = build_kernel_library("llama_forward", {**shape.macros, **types})
        self._library.width.restype = ctypes.c_int64
        self._library.forward.restype = None
        self._model = _Model(
            layers=(_Layer * len(table))(*table),
            count=len(table),
            hidden=head.in_features,
            inner=_native(mlp.down_proj).in_features,
            vocabulary=head.out_features,
            length=cache.length,
            last_norm=self._floats(norm.weight),
            head=self._weights(head),
            epsilon=norm.variance_epsilon,
            scale=attention.scaling,
            threads=torch.get_num_threads(),
        )
        self._width: int = self._library.width(ctypes.byref(self._model))
        self._workspace = torch.empty(0)

    def forward(self, batch: Layout, logits_indices: Tensor) -> Tensor:
        """Compute a forward pass and return the logits of some tokens, (indices, vocabulary) float32.

        Args: logits_indices: (indices,) int64, the tokens of the batch whose logits are needed, ascending.
        """
        count = batch.ids.shape[1]
        x = self._body.embed_tokens(batch.ids).float()
        cosines, sines = self._body.rotary_emb(x, batch.positions)
        if len(self._workspace) < count * self._width:
            self._workspace = torch.empty(count * self._width)
        logits = torch.empty(len(logits_indices), self._model.vocabulary)
        tokens = _Tokens(
            count=count,
            x=x.data_ptr(),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            rows=batch.rows.data_ptr(),
            positions=batch.positions.data_ptr(),
            wanted=logits_indices.data_ptr(),
            wanted_count=len(logits_indices),
            scores=logits.data_ptr(),
            room=self._workspace.data_ptr(),
        )
        self._library.forward(ctypes.byref(self._model), ctypes.byref(tokens))
        return logits

    def _layer(self, number: int, layer: Any, cache: RowCache) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = _fused(attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up = _fused(mlp.gate_proj, mlp.up_proj)
        keys, values = cache.layer(number)
        return _Layer(
            attention_norm=self._floats(layer.input_layernorm.weight),
            qkv=self._weights(qkv),
            q_norm=self._floats(getattr(getattr(attention, "q_norm", None), "weight", None)),
            k_norm=self._floats(getattr(getattr(attention, "k_norm", None), "weight", None)),
            o=self._weights(_native(attention.o_proj)),
            mlp_norm=self._floats(layer.post_attention_layernorm.weight),
            gate_up=self._weights(gate_up),
            down=self._weights(_native(mlp.down_proj)),
            keys=self._pointer(keys),
            values=self._pointer(values),
            window=cache.windows[number] or 0,
        )

    def _weights(self, linear: NativeLinear) -> _Weights:
        self._referenced.append(linear)
        return _Weights(*map(self._pointer, (linear.packed_weight, linear.scales, linear.bias)))

    def _floats(self, weight: Tensor | None) -> int | None:
        return self._pointer(None if weight is None else weight.detach().float())

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._referenced.append(tensor)
        return tensor.data_ptr()


def _linears(layer: Any) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    first = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*first, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _native(layer: Any) -> NativeLinear:
    if not isinstance(layer, NativeLinear):
        raise CompileError("not all of its linear layers are in panels")
    return layer


def _fused(*layers: Any) -> NativeLinear:
    """Return the fused product that several layers are slices of."""
    if not all(isinstance(layer, Part) for layer in layers):
        raise CompileError("not all of its linear layers are in panels")
    return _native(layers[0].fused.product)
