"""Describe the machine that a benchmark ran on: its processor, cores, and the instruction sets that matter here."""

import os
import platform
from pathlib import Path

INSTRUCTION_SETS = (
    "avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8 "
    "asimd asimddp sve sve2 bf16 i8mm"
).split()
"""As /proc/cpuinfo spells them; all others are left out of reports."""


def processor() -> str:
    """Return the processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Return those of `INSTRUCTION_SETS` that the processor has; empty where /proc/cpuinfo does not exist."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [name for name in INSTRUCTION_SETS if name in flags]


def describe() -> str:
    """Return one line for the head of a report."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = " ".join(instruction_sets()) or "features unknown"
    return f"{cores} cores of {processor()} ({features}), Python {platform.python_version()}"


def _cpuinfo(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    fields = ((name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines))
    return next((value for name, value in fields if name == field), None)
