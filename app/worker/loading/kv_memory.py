"""How much memory the KV cache may take."""

from pathlib import Path

import torch

SHARE = {"cuda": 0.8, "cpu": 0.4, "mps": 0.4}
"""Share of the free memory: on a GPU the rest is for activations; elsewhere other programs need some as well."""
UNKNOWN_BYTES = 4 * 1024**3
"""Assumed to be free where the system does not say."""


def kv_cache_bytes(device: str) -> int:
    """Return how many bytes the KV cache may take on a device, beside what is in use now."""
    return int(free_bytes(device) * SHARE[device])


def free_bytes(device: str) -> int:
    """Return how many bytes are free on a device."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else min(_available_bytes(), cgroup_bytes())


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return UNKNOWN_BYTES
    available = [line for line in lines if line.startswith("MemAvailable:")]
    return int(available[0].split()[1]) * 1024 if available else UNKNOWN_BYTES


def cgroup_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what the container's memory limit leaves; `/proc/meminfo` shows the whole machine's memory."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - int(used))
