"""A model's layers compiled by torch, with attention over rows as one operator in their midst.

On a GPU a step of few tokens is many tiny kernels; compiled, those between two matrix products are one.  The layers of
a model share their code, so that one of each kind is compiled, once for a single token and once for any number.
Attention looks at another set of rows in every step and stays outside, behind an operator that the compiler takes as
given.  Knows no packed layers: those are a CPU's, where compiling gained nothing (docs/benchmarks/log.md).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from app.worker.execution.kv_cache import RowCache
from app.worker.execution.model_runner import TOLERANCE, RowModel
from app.worker.execution.native.native_build import CompileError

ATTENTION = "compiled rows"
"""The name under which transformers knows attention that goes through the operator."""

_numbers = count()
_caches: WeakValueDictionary[int, RowCache] = WeakValueDictionary()
"""By the number that a model's layers hand to the operator."""


def compile_layers(rows: RowModel, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the layers of a model that serves in rows; its rows must be empty, and are used.

    Args: backend: what torch compiles with.
    Raises: CompileError: they cannot be compiled, or compute something else then; the model is left as it was.
    """
    before = rows.probe()
    layers = list(_layers(rows.model))
    if not layers:
        raise CompileError("nothing says which modules are its layers")
    number = next(_numbers)
    _caches[number] = rows.cache
    for module in rows.model.modules():
        if hasattr(module, "layer_idx"):
            module.rows_number = number
    # Layers differ in their numbers only; as constants, those would be compiled in one by one.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    rows.cache.outside = True
    rows.model.set_attn_implementation(ATTENTION)
    try:
        for layer in layers:
            layer.compile(dynamic=True, backend=backend)
        difference = rows.apart(before)
        if not difference <= TOLERANCE[rows.model.dtype]:
            raise CompileError(f"its scores differ by {difference:.1%} when its layers are compiled")
    except Exception as error:
        rows.restore()
        for layer in layers:
            layer._compiled_call_impl = None
        if isinstance(error, CompileError):
            raise
        raise CompileError(f"torch cannot compile its layers ({type(error).__name__})") from error


def _layers(model: Any) -> Iterator[nn.Module]:
    """Find the blocks that a model is a stack of, by what transformers keeps whole when it spreads them over GPUs."""
    names = set(model._no_split_modules or ())
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
    """What transformers calls in every layer; that the model asks for nothing else was proved before."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    places = module.rows_number, module.layer_idx
    done: Tensor = torch.ops.llm_rows.attend(query, key, value, *places, scale, sliding_window, softcap)
    return done, None


AttentionInterface.register(ATTENTION, _attend)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    number: int,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    cache = _caches[number]
    return cache.attend(query, *cache.write(key, value, layer), scale, window, softcap)


def _shape(query: Tensor, key: Tensor, value: Tensor, *others: Sequence[Any]) -> Tensor:
    _, heads, tokens, _ = query.shape
    return query.new_empty(1, tokens, heads, value.shape[-1])


_OPERATOR = "llm_rows::attend"
torch.library.define(
    _OPERATOR,
    "(Tensor query, Tensor key, Tensor value, SymInt number, SymInt layer, float scale, SymInt? window, float? softcap)"
    " -> Tensor",
)
torch.library.impl(_OPERATOR, "CompositeExplicitAutograd", _run)
torch.library.register_fake(_OPERATOR, _shape)
