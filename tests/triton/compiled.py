"""Compile the kernels for some GPUs, none of which need be here, and print what each takes of one: JSON, a line each.

It has to run without Triton's interpreter: `python -m tests.triton.compiled`.
"""

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from app.worker.execution.base import AttentionSpec
from app.worker.execution.graphs.split_kv_attention import SplitKVAttention
from app.worker.execution.packed_batch import PackedBatch, Segment

KV_HEADS, ROWS, LENGTH = 2, 8, 2048


@dataclass(frozen=True)
class Case:
    """A GPU by its compute capability, and heads."""

    capability: int
    dtype: torch.dtype
    group: int
    key_size: int
    value_size: int
    window: int | None = None
    softcap: float | None = None


CASES = (
    Case(80, torch.bfloat16, 4, 64, 64),
    Case(86, torch.float16, 1, 128, 128),
    Case(89, torch.bfloat16, 4, 128, 128),
    Case(90, torch.bfloat16, 4, 128, 128),
    Case(90, torch.bfloat16, 8, 80, 96, 1024, 50.0),
    Case(90, torch.bfloat16, 2, 256, 256, 512),
    Case(90, torch.float32, 8, 128, 128),
    Case(90, torch.float32, 1, 64, 64),
    Case(120, torch.bfloat16, 16, 128, 128),
)


class NoDriver:
    """Stands for the driver of a GPU that is not here: kernels are compiled for it and never launched."""

    capability = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # A device of its own for each kind of GPU: compiled kernels are found by its number.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(case: Case) -> list[Any]:
    """Return the kernels that attention would launch."""
    segments = [Segment(row, LENGTH - 1, [0]) for row in range(ROWS)]
    batch = PackedBatch(segments, [1] * ROWS, torch.device("cpu"))
    heads = case.group * KV_HEADS
    keys, values = (
        torch.zeros(ROWS, KV_HEADS, LENGTH, size, dtype=case.dtype) for size in (case.key_size, case.value_size)
    )
    query = torch.zeros(ROWS, heads, case.key_size, dtype=case.dtype)
    sizes, types = (heads, KV_HEADS, case.key_size, case.value_size), frozenset({case.dtype})
    spec = AttentionSpec(*sizes, types, "cpu", case.window, case.softcap)
    kernels: list[Any] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    run = JITFunction.run
    JITFunction.run = compile_only
    try:
        SplitKVAttention(528).attend(query, keys, values, batch, spec, case.key_size**-0.5)
    finally:
        JITFunction.run = run
    return kernels


def usage(kernel: Any) -> dict[str, object]:
    """Return what a kernel takes: bytes of shared memory, registers, and bytes of them that did not fit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "kernel": kernel.name,
        "shared": kernel.metadata.shared,
        "registers": int(re.findall(r"REG:(\d+)", listing)[0]),
        "spilled": sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", listing)),
        "matrix_instructions": len(re.findall(r"\bw?g?mma\.(?:sync|mma_async)", kernel.asm["ptx"])),
        "asynchronous_copies": len(re.findall(r"cp\.async\.c[ag]\.shared\.global .*0x10", kernel.asm["ptx"])),
    }


def main() -> None:
    driver = NoDriver()
    triton.runtime.driver.set_active(driver)
    for case in CASES:
        driver.capability = case.capability
        for kernel in compiled(case):
            facts = {"capability": case.capability, "dtype": str(case.dtype), **usage(kernel)}
            print(json.dumps(facts), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
