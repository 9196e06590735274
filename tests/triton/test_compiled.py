"""The Triton kernels can be compiled for GPUs, and what they take of one is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

ROOT = Path(__file__).parents[2]


def test_the_kernels_fit_gpus(tmp_path: Path) -> None:
    """Compiled for five kinds, as they would be launched: nothing is spilled, and types of 16 bits are multiplied in
    matrix instructions, with the next keys on their way meanwhile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)

    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.compiled"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip

    from app.worker.execution.graphs.split_kv_attention import SHARED_BYTES

    assert 0 == done.returncode, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"attend_part", "combine_parts"} == {each["kernel"] for each in kernels}
    assert {80, 86, 89, 90, 120} == {each["capability"] for each in kernels}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert 0 == kernel["spilled"], kernel
        if kernel["kernel"] == "attend_part":
            assert kernel["asynchronous_copies"], kernel
            assert (kernel["dtype"] == "torch.float32") == (not kernel["matrix_instructions"]), kernel
