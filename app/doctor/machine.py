"""Examines the machine: Python and its libraries, processor, compiler, GPU, memory, limits of the system, the clock."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from app.doctor.findings import Finding, megabytes, ok, problem, warning

ENOUGH_FILES = 4096
"""Each connection and each stream takes a descriptor."""
ENOUGH_MEMORY = 1_000_000_000
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16")
"""What native kernels and torch choose their instructions by, of x86 and ARM."""
_COMPILERS = ("c++", "g++", "clang++")
NVIDIA_DEVICE = Path("/dev/nvidiactl")
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""A folder for each GPU, whose file `information` names it; a container may lack it."""


def examine_machine() -> Iterator[Finding]:
    yield from _python()
    yield from _processor()
    yield from _gpu()
    yield from _memory()
    yield from _files()
    yield from _clock()


def _python() -> Iterator[Finding]:
    found = f"Python {platform.python_version()}"
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        yield problem("Python", f"{found} is not supported", "use Python 3.11, 3.12 or 3.13")
    versions, missing = [], []
    for name in ("torch", "transformers", "langchain-core", "fastapi", "sqlalchemy"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        yield problem("Python", f"{', '.join(missing)} is not installed", "run make install")
    yield ok("Python", f"{found}, {', '.join(versions)}")


def _processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = set(_read("/proc/cpuinfo").replace("\n", " ").split())
    found = [flag for flag in _CPU_FLAGS if flag in flags]
    yield ok("processor", f"{platform.machine()}, {cores} cores{', ' + ' '.join(found) if found else ''}")
    if compiler := next((path for name in _COMPILERS if (path := shutil.which(name))), None):
        yield ok("compiler", f"{compiler} compiles layers for this machine")
    else:
        advice = "apt-get install g++ lets layers be compiled for this machine"
        yield warning("compiler", "there is no C++ compiler, so models run slower", advice)


def _gpu() -> Iterator[Finding]:
    if not NVIDIA_DEVICE.exists():
        yield ok("GPU", "there is none of NVIDIA's")
        return
    lines = [line for path in NVIDIA_GPUS.glob("*/information") for line in _read(str(path)).splitlines()]
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    found = ", ".join(sorted(names)) or "one of NVIDIA's"
    try:
        torch = version("torch")
    except PackageNotFoundError:  # said above
        return
    if torch.endswith("+cpu"):
        advice = "move .venv away, and run make install without TORCH_INDEX_URL"
        yield warning("GPU", f"{found}, which torch {torch}, built for processors, cannot use", advice)
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield warning("GPU", f"{found}, hidden by CUDA_VISIBLE_DEVICES", "unset it for models to run there")
    else:
        yield ok("GPU", found)


def available_memory() -> int | None:
    """Return the bytes that a process could take now, by the machine and by its control group; None if unknown."""
    lines = (line.split() for line in _read("/proc/meminfo").splitlines())
    found = [int(line[1]) * 1024 for line in lines if line[:1] == ["MemAvailable:"]]
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdecimal() and used.isdecimal():
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _memory() -> Iterator[Finding]:
    memory = available_memory()
    if memory is None:
        return
    text = f"{megabytes(memory)} of memory are free"
    if memory < ENOUGH_MEMORY:
        yield warning("memory", text, "the API process takes 0.2 GB, a model its weights twice while it loads")
    else:
        yield ok("memory", text)


def _files() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # Windows
        return
    # The start raises the soft limit to the hard one.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    text = f"{_number(hard)} files and connections may be open at once"
    if hard != resource.RLIM_INFINITY and hard < ENOUGH_FILES:
        yield warning("limits", text, f"raise the hard limit to {ENOUGH_FILES} or more (ulimit -Hn, LimitNOFILE)")
    else:
        yield ok("limits", text)
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size != resource.RLIM_INFINITY:
        text = f"files may not grow beyond {megabytes(size)}"
        yield warning("limits", text, "ulimit -f unlimited, or the database fails at that size")


def _number(limit: int) -> str:
    return f"{limit}" if 0 <= limit < 2**40 else "unlimited"


def _clock() -> Iterator[Finding]:
    now = datetime.now(UTC)
    files = datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)
    if now < files - timedelta(days=1):
        text = f"the clock says {now:%Y-%m-%d %H:%M} UTC, and this program was installed after that"
        yield problem("clock", text, "set the clock; months, expiries and certificates go by it")
    else:
        yield ok("clock", f"{now:%Y-%m-%d %H:%M} UTC")


def _read(path: str) -> str:
    """Return the text of one of the system's files, empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
