"""How much memory a model may still take for its KV cache."""

from pathlib import Path

import torch

SHARE = {"cuda": 0.8, "cpu": 0.4, "mps": 0.4}
"""Of what is free: on a GPU the rest is for a step's own numbers; elsewhere other programs need some as well."""
UNKNOWN_BYTES = 4 * 1024**3
"""Taken as free where the system does not say."""


def bytes_for_rows(device: str) -> int:
    """Return how many bytes rows may take on a device, beside what is in use now."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else min(_system_bytes(), _group_bytes())
    return int(free * SHARE[device])


def _system_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return UNKNOWN_BYTES
    available = [line for line in lines if line.startswith("MemAvailable:")]
    return int(available[0].split()[1]) * 1024 if available else UNKNOWN_BYTES


def _group_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what a container's limit leaves; containers see the whole machine's memory otherwise."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - int(used))
