"""Attention over rows in C++, compiled when a model is loaded, for that model and this processor.

torch's own attention is made for many queries over the same keys: for one new token of each row, and for pieces of
prompts, much of its time goes into starting thousands of small matrix products.  Keys and values are in float32 or
bfloat16, on a CPU.  Decides when it is not to be trusted; knows no layout of a pass.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from app.worker.execution.native.native_build import CompileError, compile_program

LANES = 8
"""Numbers of a vector; a head's size is a multiple of it."""
NUMBERS = {torch.float32: "float", torch.bfloat16: "Bfloat"}
"""Types of keys and values, as the programs call them."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far its numbers may be from those computed by torch, as a share of their norm."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of attention in every layer of a model."""

    kv: int
    """Heads of keys and values."""
    groups: int
    """Query heads of each of them."""
    size: int
    """Numbers of a head."""
    dtype: torch.dtype = torch.float32
    """Of keys, values and what attention returns."""

    @property
    def macros(self) -> dict[str, str | int]:
        """What a program is compiled with.

        Raises: CompileError: there is none for such heads.
        """
        if self.size % LANES:
            raise CompileError(f"heads of {self.size} numbers do not fill vectors")
        return {"KV_HEADS": self.kv, "GROUPS": self.groups, "SIZE": self.size, "NUMBER": NUMBERS[self.dtype]}


class CompiledAttention:
    """The compiled program."""

    def __init__(self, heads: Heads) -> None:
        """Make the program and try it out.

        Raises: CompileError: there is no compiler, or what it makes does not work here.
        """
        self._heads = heads
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        program = compile_program("attention", heads.macros)
        self._attend, self._keep = program.attend, program.keep
        self._attend.argtypes = [*[pointer] * 7, number, number, ctypes.c_float, ctypes.c_int]
        self._keep.argtypes = [pointer, number, number, pointer, pointer, pointer, number, number]
        self._attend.restype = self._keep.restype = None
        self._try_out()

    def keep(self, states: Tensor, to: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Write the keys or values of some tokens to their places.

        Args:
            states: (1, KV heads, tokens, size)
            to: (rows, KV heads, length, size), a layer's.
            rows, positions: (tokens,)
        """
        if states.stride(-1) != 1:
            states = states.contiguous()
        self._keep(
            states.data_ptr(),
            states.stride(1),
            states.stride(2),
            to.data_ptr(),
            rows.data_ptr(),
            positions.data_ptr(),
            len(rows),
            to.shape[2],
        )

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        rows: Tensor,
        seen: tuple[Tensor, Tensor],
        scale: float,
    ) -> None:
        """Attend each token to its own row.

        Args:
            q, out: (tokens, heads, size); `out` is written and has no gaps.
            keys, values: (rows, KV heads, length, size), a layer's.
            rows: (tokens,); neighbours of one row are attended to together.
            seen: the first key that each token looks at and the one after its last, (tokens,) both; neither goes back
                from one token of a row to its next.
        """
        q = q.contiguous()
        first, end = seen
        self._attend(
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            rows.data_ptr(),
            first.data_ptr(),
            end.data_ptr(),
            len(rows),
            keys.shape[2],
            scale,
            torch.get_num_threads(),
        )

    def _try_out(self) -> None:
        """Raises: CompileError: it computes something else than torch does."""
        heads, length, tokens = self._heads, 19, 5
        generator = torch.Generator().manual_seed(0)

        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(heads.dtype)

        keys, values = made(2, tokens + 1, heads.kv, length, heads.size).unbind()
        q = made(tokens, heads.kv * heads.groups, heads.size)
        new = made(1, heads.kv, tokens, heads.size)
        rows, first, end = torch.tensor([[3, 0, 2, 2, 2], [0, 4, 0, 0, 1], [1, 17, 17, 18, 19]])
        out, scale = torch.empty_like(q), 1 / math.sqrt(heads.size)
        self.keep(new, keys, rows, end - 1)
        self.attend(q, keys, values, out, rows, (first, end), scale)
        for number, (row, begin, stop) in enumerate(zip(rows.tolist(), first.tolist(), end.tolist(), strict=True)):
            k, v = (each[row, :, begin:stop].float().repeat_interleave(heads.groups, 0) for each in (keys, values))
            expected = (torch.softmax(scale * (k @ q[number, :, :, None].float())[..., 0], -1)[:, None] @ v)[:, 0]
            kept = torch.equal(keys[row, :, stop - 1], new[0, :, number])
            if not kept or not (out[number] - expected).norm() <= TOLERANCE[heads.dtype] * expected.norm():
                raise CompileError("the compiled attention computes something else")
