"""How much memory the KV cache may take."""

import logging
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SHARE = {"cuda": 0.9, "cpu": 0.4, "mps": 0.4}
"""Share of the free memory: on a GPU the rest is for graphs and sampling, elsewhere for other programs, too."""
MIN_TRIAL_TOKENS = 16
"""Fewer tokens of a trial step say nothing."""
UNKNOWN_BYTES = 4 * 1024**3
"""Assumed to be free where the system does not say."""


def kv_cache_bytes(device: str, *, step_bytes: int = 0) -> int:
    """Return how many bytes the KV cache may take on a device, beside what is in use now and what a step takes."""
    return max(0, int((free_bytes(device) - step_bytes) * SHARE[device]))


@torch.inference_mode()
def trial_step_bytes(model: Any, tokens: int) -> int:
    """Return what a step of so many tokens, or fewer if they do not fit, takes for itself on a GPU; 0 elsewhere."""
    if model.device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        while tokens > MIN_TRIAL_TOKENS:
            try:
                ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
                break
            except torch.OutOfMemoryError:
                tokens //= 2
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001  # whoever serves the model finds out what is wrong with it
        log.info("what a step takes is not known: %s", type(error).__name__)
        return 0
    taken = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    return taken


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
