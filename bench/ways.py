"""Every way of execution on the whole model, in turns, beside what the load measured on some layers, and its choice.

    python -m bench.ways [--shape 135m|tiny] [--dtype float32|bfloat16] [--quantization int8] [--copies 2]

Prints a table for docs/benchmarks: ms a step, and in brackets what the load expected.  Weights are random.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from app.ipc.messages import ModelSpec
from app.worker.execution.base import Executor, OptionalExecutor
from app.worker.execution.executor_selection import WaySelection, cpu_layouts
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.model_sample import shared_copy
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.execution.way_timing import step_seconds
from app.worker.execution.ways import Shape
from app.worker.loading.loader import load
from bench.machine import describe
from bench.model import SHAPES
from bench.runners import make_model

STEPS = [Shape("decode", 1), Shape("decode", 8), Shape("decode", 32), Shape("prompt", 105), Shape("prompt", 512)]
CHOSEN = "auto"


def load_model(folder: Path, given: argparse.Namespace) -> Any:
    """Load the model as a worker does."""
    spec = ModelSpec(
        name=str(make_model(folder, given.shape)),
        source="local",
        device="cpu",
        dtype=given.dtype,
        quantization=given.quantization,
        revision=None,
        max_model_len=None,
        threads=given.threads,
    )
    return load(spec, str(folder / "tokenizer"), on_stage=lambda _: None).pipeline.model


def install_all(runner: ModelRunner) -> dict[str, OptionalExecutor]:
    """Install every way on a copy of the model's modules; those that cannot be had are left out."""
    installed: dict[str, OptionalExecutor] = {}
    for layout in cpu_layouts("auto", keep_layers=False):
        for name, way in layout.ways(shared_copy(runner.model), runner.cache).items():
            try:
                way.install()
            except Exception as error:  # noqa: BLE001  # it is measured what there is
                print(f"without {name}: {error}", file=sys.stderr)
            else:
                installed[name] = way
    return installed


@torch.inference_mode()
def measure(ways: Mapping[str, tuple[ModelRunner, Executor]], rounds: int) -> dict[str, dict[Shape, float]]:
    """Return the median seconds of each step by way, after a round that does not count."""
    found: dict[str, dict[Shape, list[float]]] = {name: {shape: [] for shape in STEPS} for name in ways}
    for number in range(rounds + 1):
        for shape in STEPS:
            for name, (runner, way) in ways.items():
                seconds = step_seconds(runner, way, shape)
                if number:
                    found[name][shape].append(seconds)
    return {name: {shape: statistics.median(each) for shape, each in times.items()} for name, times in found.items()}


def table(found: Mapping[str, Mapping[Shape, float]], expected: Mapping[str, Mapping[Shape, float]]) -> str:
    """Return the table of steps by way."""
    lines = [
        "| way | " + " | ".join(f"{kind} {tokens}" for kind, tokens in STEPS) + " |",
        "|---" * (1 + len(STEPS)) + "|",
    ]
    for name, times in found.items():
        cells = [_cell(times[shape], expected.get(name, {}).get(shape)) for shape in STEPS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(seconds: float, expected: float | None) -> str:
    return f"{1000 * seconds:.1f}" + ("" if expected is None else f" ({1000 * expected:.1f})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model twice, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--quantization", choices=["none", "int8"], default="none")
    parser.add_argument("--copies", type=int, default=1, help="as model.max_weight_copies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        plain, chosen = (
            create_torch_runner(load_model(Path(folder), given), length=640, slots=32, free_bytes=2**32)
            for _ in range(2)
        )
    WaySelection(chosen, cpu_layouts("auto", keep_layers=False)).select(given.copies)
    expected = {
        way: {Shape(times.kind, times.tokens): times.milliseconds[way] / 1000 for times in chosen.step_times}
        for times in chosen.step_times[:1]
        for way in times.milliseconds
    }
    ways: dict[str, tuple[ModelRunner, Executor]] = {CHOSEN: (chosen, chosen.executor)}
    ways |= {name: (plain, way) for name, way in install_all(plain).items()}
    found = measure(ways, given.rounds)
    print(f"{describe()}, {torch.get_num_threads()} threads, {plain.model.dtype}, quantization {given.quantization}")
    print("chosen: " + ", ".join(f"{each.kind} {each.tokens} by {each.way}" for each in chosen.step_times))
    print(f"\n{table(found, expected)}")


if __name__ == "__main__":
    main()
