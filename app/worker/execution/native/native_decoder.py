"""The layers of Llama and its relatives in one call of a program of our own (native/llama_forward.cpp).

For few tokens a step of torch's is mostly the calling of operators, a thousand of them; here it is one call, and takes
as long as reading the weights.  Decides which models it computes; that it computes the same is for others to see.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from app.worker.execution.kv_cache import RowCache
from app.worker.execution.native.attention import LANES, NUMBERS
from app.worker.execution.native.native_build import CompileError, compile_program
from app.worker.execution.native.packed_linear import PANEL, PanelLinear
from app.worker.execution.packed_batch import Layout
from app.worker.execution.qkv_fusion import Part

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""By the `model_type` of their configuration: the same layers, with or without biases, norms of heads and windows."""
ACTIVATIONS = frozenset({"silu", "swish"})
"""Two names of one."""
TYPES = {torch.int8: "Byte", torch.float16: "Half", torch.bfloat16: "Bfloat", torch.float32: "float"}
"""Of weights, in the program."""


class _Weights(ctypes.Structure):
    """`Weights` of the program."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("panels", "scales", "bias")]


class _Layer(ctypes.Structure):
    """`Layer` of the program."""

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
    """`Model` of the program."""

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
    """`Tokens` of the program."""

    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "cosines", "sines", "rows", "positions", "wanted")),
        ("wanted_count", ctypes.c_int64),
        ("scores", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
    ]


def may_be_compiled(model: Any) -> None:
    """Look at a model that has not been packed yet.

    Raises: CompileError: its layers are of another kind.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise CompileError(f"{config.model_type} has layers of another kind")
    if model.dtype not in NUMBERS or config.hidden_act not in ACTIVATIONS:
        raise CompileError(f"there are none in {str(model.dtype).removeprefix('torch.')} with {config.hidden_act}")
    if config.hidden_size % LANES or config.intermediate_size % PANEL:
        raise CompileError(f"sizes of {config.hidden_size} and {config.intermediate_size} do not fill vectors")
    if any(type(each) is not nn.Linear for layer in model.model.layers for each in _linears(layer)):
        raise CompileError("its linear layers are quantized")


class CompiledLayers:
    """All layers of one model over one cache."""

    def __init__(self, model: Any, cache: RowCache) -> None:
        """Make the program.

        Args:
            model: one that `may_be_compiled`, with its linear layers in panels.
            cache: has computed something with it.

        Raises: CompileError: its weights are of two types, or there is no compiler.
        """
        self._body, head = model.model, _panels(model.get_output_embeddings())
        heads = cache.same_heads()
        attention, mlp, norm = self._body.layers[0].self_attn, self._body.layers[0].mlp, self._body.norm
        self._kept: list[Any] = [model, head]
        """What the program has pointers to."""
        table = [self._layer(number, layer, cache) for number, layer in enumerate(self._body.layers)]
        kinds = {each.panels.dtype for each in self._kept if isinstance(each, PanelLinear) and each is not head}
        if len(kinds) > 1:
            raise CompileError("its weights are not all of one type")
        types = {"WEIGHT": TYPES[kinds.pop()], "HEAD": TYPES[head.panels.dtype]}
        self._program = compile_program("llama_forward", {**heads.macros, **types})
        self._program.width.restype = ctypes.c_int64
        self._program.forward.restype = None
        self._model = _Model(
            layers=(_Layer * len(table))(*table),
            count=len(table),
            hidden=head.inputs,
            inner=_panels(mlp.down_proj).inputs,
            vocabulary=head.outputs,
            length=cache.length,
            last_norm=self._floats(norm.weight),
            head=self._weights(head),
            epsilon=norm.variance_epsilon,
            scale=attention.scaling,
            threads=torch.get_num_threads(),
        )
        self._width: int = self._program.width(ctypes.byref(self._model))
        self._room = torch.empty(0)

    def scores(self, layout: Layout, wanted: Tensor) -> Tensor:
        """Compute a pass and return the scores after the wanted tokens, (wanted, vocabulary).

        Args: wanted: places of tokens in the pass, ascending.
        """
        count = layout.ids.shape[1]
        x = self._body.embed_tokens(layout.ids).float()
        cosines, sines = self._body.rotary_emb(x, layout.positions)
        if len(self._room) < count * self._width:
            self._room = torch.empty(count * self._width)
        scores = torch.empty(len(wanted), self._model.vocabulary)
        tokens = _Tokens(
            count=count,
            x=x.data_ptr(),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            rows=layout.rows.data_ptr(),
            positions=layout.positions.data_ptr(),
            wanted=wanted.data_ptr(),
            wanted_count=len(wanted),
            scores=scores.data_ptr(),
            room=self._room.data_ptr(),
        )
        self._program.forward(ctypes.byref(self._model), ctypes.byref(tokens))
        return scores

    def _layer(self, number: int, layer: Any, cache: RowCache) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = _together(attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up = _together(mlp.gate_proj, mlp.up_proj)
        keys, values = cache.layer(number)
        return _Layer(
            attention_norm=self._floats(layer.input_layernorm.weight),
            qkv=self._weights(qkv),
            q_norm=self._floats(getattr(getattr(attention, "q_norm", None), "weight", None)),
            k_norm=self._floats(getattr(getattr(attention, "k_norm", None), "weight", None)),
            o=self._weights(_panels(attention.o_proj)),
            mlp_norm=self._floats(layer.post_attention_layernorm.weight),
            gate_up=self._weights(gate_up),
            down=self._weights(_panels(mlp.down_proj)),
            keys=self._pointer(keys),
            values=self._pointer(values),
            window=cache.windows[number] or 0,
        )

    def _weights(self, linear: PanelLinear) -> _Weights:
        self._kept.append(linear)
        return _Weights(*map(self._pointer, (linear.panels, linear.scales, linear.bias)))

    def _floats(self, weight: Tensor | None) -> int | None:
        return self._pointer(None if weight is None else weight.detach().float())

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor)
        return tensor.data_ptr()


def _linears(layer: Any) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    first = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*first, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _panels(layer: Any) -> PanelLinear:
    if not isinstance(layer, PanelLinear):
        raise CompileError("not all of its linear layers are in panels")
    return layer


def _together(*layers: Any) -> PanelLinear:
    """Return the product that several layers are parts of."""
    if not all(isinstance(layer, Part) for layer in layers):
        raise CompileError("not all of its linear layers are in panels")
    return _panels(layers[0].fused.product)
