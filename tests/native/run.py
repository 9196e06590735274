"""Build the C++ tests of the kernels and run them under sanitizers: `make test-native`.

Each test is built with AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and once more for the
instruction sets of older processors; products in tiles (AMX) are computed by emulated ones.  ThreadSanitizer does not
see how GCC's libgomp synchronises and would report a race at every barrier, so that build is Clang's, whose OpenMP
runtime describes its barriers to it (Archer).
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from app.worker.execution.native.native_build import FLAGS, SOURCE_DIR

TESTS = Path(__file__).parent
# -O1 keeps the build short and the reports readable.
DEBUG = (*(flag for flag in FLAGS if flag not in {"-O3", "-shared", "-fPIC"}), "-O1", "-g", f"-I{SOURCE_DIR}")
# What GCC warns of in its own header, and because the tests include the sources.
WARNINGS = (
    *("-Wall", "-Wextra", "-Werror"),
    *("-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-subobject-linkage"),
)
EMULATED_TILES = "-DLLMK_EMULATE_TILES=1"
PACKAGES = "g++ clang libomp-dev libclang-rt-dev"
SECONDS = 300
"""For each compilation and each test."""


@dataclass(frozen=True, slots=True)
class Build:
    """A compiler with the flags of one way to build all tests."""

    name: str
    compiler: str
    flags: tuple[str, ...]


def builds() -> list[Build]:
    """Return all builds for this kind of machine."""
    address, undefined = "-fsanitize=address", ("-fsanitize=undefined", "-fno-sanitize-recover=all")
    found = [Build("address", "g++", (address,)), Build("undefined", "g++", undefined)]
    if platform.machine() == "x86_64":
        older = {"avx2": "-march=haswell", "sse2": "-march=x86-64"}
        found += [Build(name, "g++", (flag, address)) for name, flag in older.items()]
    return [*found, Build("thread", "clang++", ("-fsanitize=thread",))]


def tests(build: Build) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each source with the macros that it is compiled with in a build."""
    yield "simd", ()
    yield "kv_blocks", ()
    yield "gemm", ()
    # In tiles, which few processors have.
    yield "gemm", (EMULATED_TILES,)
    for kv_heads, queries, size, kv in (
        (1, 1, 8, "float"),
        (2, 3, 64, "float"),
        (1, 7, 80, "float"),
        (1, 2, 24, "bfloat16"),
        (2, 3, 64, "bfloat16"),
        (1, 7, 80, "bfloat16"),
    ):
        tiles = (EMULATED_TILES,) if kv == "bfloat16" else ()
        yield "attention", (*heads(kv_heads, queries, size, kv), *tiles)
    for weight, head in (("float", "int8_t"), ("int8_t", "float"), ("float16", "float16"), ("bfloat16", "bfloat16")):
        # With SSE2 alone the processor does not convert float16, and the service stores no weights in it.
        if weight == "float16" and build.name == "sse2":
            continue
        types = (f"-DLLMK_WEIGHT_TYPE={weight}", f"-DLLMK_LM_HEAD_TYPE={head}")
        kv = "bfloat16" if weight == "bfloat16" else "float"
        yield "llama_forward", (*heads(2, 2, 32, kv), *types, EMULATED_TILES)


def heads(kv_heads: int, queries: int, size: int, kv: str) -> tuple[str, ...]:
    """Return the macros of attention."""
    shape = (f"-DLLMK_NUM_KV_HEADS={kv_heads}", f"-DLLMK_QUERIES_PER_KV={queries}", f"-DLLMK_HEAD_SIZE={size}")
    return (*shape, f"-DLLMK_KV_TYPE={kv}")


def run(case: tuple[Build, str, tuple[str, ...]], folder: Path) -> tuple[str, str]:
    """Build and run one test; return its name and what went wrong, empty if nothing did."""
    build, source, macros = case
    values = [macro.partition("=")[2] for macro in macros]
    name = f"{build.name:9} {source} {' '.join(values)}".rstrip()
    program = folder / "-".join([build.name, source, *values])
    command = [build.compiler, *DEBUG, *WARNINGS, *build.flags, *macros, str(TESTS / f"{source}_test.cpp"), "-o"]
    environment = {**os.environ, "TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}
    for step in ([*command, str(program)], [str(program)]):
        try:
            done = subprocess.run(step, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
        except subprocess.TimeoutExpired:
            return name, f"not done after {SECONDS} seconds"
        if done.returncode:
            return name, done.stdout + done.stderr or f"exit status {done.returncode}"
    return name, ""


def main() -> int:
    """Return the exit status."""
    start, chosen = time.monotonic(), builds()
    missing = sorted({build.compiler for build in chosen if shutil.which(build.compiler) is None})
    if missing:
        sys.stderr.write(f"{' and '.join(missing)} not found (Debian: apt-get install {PACKAGES})\n")
        # Clang may be missing, except in CI, which sets REQUIRE_SERVICES.
        if "REQUIRE_SERVICES" in os.environ or "g++" in missing:
            return 1
    usable = [build for build in chosen if build.compiler not in missing]
    cases = [(build, source, macros) for build in usable for source, macros in tests(build)]
    with tempfile.TemporaryDirectory(prefix="llm-native-") as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda case: run(case, Path(folder)), cases))
    failures = [(name, problem) for name, problem in results if problem]
    for name, problem in failures:
        sys.stderr.write(f"FAILED {name}\n{problem}\n")
    passed, seconds = len(results) - len(failures), time.monotonic() - start
    sys.stdout.write(f"{passed} of {len(results)} native tests passed in {seconds:.0f} s\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
