"""Triton's interpreter, which runs kernels on the CPU with numpy."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def bfloat16_products() -> Iterator[None]:
    """Let the interpreter multiply bfloat16: numpy has no such type, and it would multiply the bits as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return original(self, widened(a), widened(b), *others)

    original = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = dot
    yield
    interpreter.InterpreterBuilder.create_dot = original
