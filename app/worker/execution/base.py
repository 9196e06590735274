"""The seams of execution: what turns a packed batch into logits, and what attends to and copies the KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from app.ipc.messages import Compiled
from app.worker.execution.lora import LoraAdapter
from app.worker.execution.packed_batch import PackedBatch


class UnsupportedModelError(Exception):
    """The model cannot be computed as a packed batch over KV cache slots; the message says why."""


class ExecutorUnavailableError(Exception):
    """An optional way of execution cannot be used for this model or machine; the message says why."""


class Executor(Protocol):
    """A way to compute a model's forward pass."""

    @property
    def compiled(self) -> Compiled | None:
        """Parts of the pass that were compiled for this machine."""

    def forward(self, batch: PackedBatch) -> Tensor:
        """Write the batch's keys and values to their slots and return the logits, (wanted, vocab)."""

    def forget_adapter(self, adapter: LoraAdapter) -> None:
        """Let go of the weights of an adapter that no batch will have any more."""


@runtime_checkable
class DecodingExecutor(Protocol):
    """An executor that continues the sequences of the last batch, whose slots and positions it knows."""

    def forward_next(self, tokens: Tensor) -> Tensor | None:
        """Compute one more token of each of these sequences.

        Args: tokens: (rows,) int64 on the device, what was sampled from the last batch's logits.
        Returns: the logits, (rows, vocab), until the next pass; None where that batch was not one token of each, or
            these ones need another kind of pass.
        """


class OptionalExecutor(Executor, Protocol):
    """An executor that changes the model or its KV cache to be faster, and can be taken back.

    The constructor is cheap and changes nothing.
    """

    def install(self) -> None:
        """Change the model; may raise anything, and `uninstall` is called then."""

    def uninstall(self) -> None:
        """Restore what `install` changed, also when that failed halfway."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Attention parameters of one layer, recorded in its first pass."""

    query_heads: int
    kv_heads: int
    key_size: int
    """Numbers of one head of queries and keys."""
    value_size: int
    dtypes: frozenset[torch.dtype]
    """The type of queries, keys and values."""
    device: str
    sliding_window: int | None
    """Keys that a token sees, its own included; None is no limit."""
    softcap: float | None
    """Bounds the scores by `softcap * tanh(score / softcap)`."""


class AttentionBackend(Protocol):
    """Writes keys and values to KV cache slots and attends to them."""

    def write(self, states: Tensor, storage: Tensor, batch: PackedBatch) -> None:
        """Write the new keys or values, (1, KV heads, tokens, size), to `storage`, (slots, KV heads, length, size)."""

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch, spec: AttentionSpec, scale: float
    ) -> Tensor:
        """Attend each token of `query`, (tokens, heads, size), to its own slot of one layer's keys and values.

        Returns: (tokens, heads, value size).
        """


class BlockCopier(Protocol):
    """Copies keys and values of all layers between KV cache slots and blocks of the prefix cache."""

    def save(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Copy a slot, from the token `start` on, to blocks; the last one may reach behind the slot's end."""

    def restore(self, blocks: Sequence[int], slot: int) -> None:
        """Copy blocks to the beginning of a slot, up to its end."""
