"""What LoRA adapters cost a decoding step of 8 rows: none, one, four for half of the rows and four for all, in turns.

    python -m bench.adapters [--shape 135m|tiny] [--dtype float32|bfloat16] [--stored bfloat16|float16|float32]
                             [--compile auto|none|layers] [--rank 16]

Prints a table for docs/performance.md.  Model and adapters have random weights, the adapters in every linear layer.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from app.worker.execution.executor_selection import select_executor
from app.worker.execution.linear_modules import LinearShape, linear_shapes
from app.worker.execution.lora import LoraAdapter, LoraWeights
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import Segment
from app.worker.execution.torch.torch_executor import create_torch_runner
from bench.machine import describe
from bench.model import SHAPES, make_model

ROWS = 8
KEYS = 128
"""Tokens before the one that a row computes."""
STEPS = 8
"""Of one round, each way of sharing out adapters."""
Rows = Sequence[LoraAdapter | None]


def random_adapter(shapes: Mapping[str, LinearShape], rank: int, dtype: torch.dtype, seed: int) -> LoraAdapter:
    """Return an adapter in all of these linear layers."""
    generator = torch.Generator().manual_seed(seed)

    def weight(width: int) -> torch.Tensor:
        return torch.randn(rank, width, generator=generator).mul_(0.01).to(dtype)

    layers = {path: LoraWeights(weight(shape.inputs), weight(shape.outputs)) for path, shape in shapes.items()}
    return LoraAdapter(str(seed), layers)


def shares(adapters: Sequence[LoraAdapter]) -> dict[str, Rows]:
    """Return which row has which adapter, by the words of the table."""
    one, *_ = adapters
    return {
        "none": [None] * ROWS,
        "1 adapter, 8 rows": [one] * ROWS,
        "4 adapters, 4 rows, and 4 rows without": [each for adapter in adapters for each in (adapter, None)],
        "4 adapters, 8 rows": [each for adapter in adapters for each in (adapter, adapter)],
    }


def step_seconds(runner: ModelRunner, rows: Rows, clock: Callable[[], float]) -> float:
    """Return the median time of a step in which all rows decode their token after `KEYS` others."""
    segments = [Segment(row, KEYS, [row], adapter) for row, adapter in enumerate(rows)]
    times = list[float]()
    for _ in range(STEPS):
        began = clock()
        runner.forward(segments, [True] * ROWS)
        times.append(clock() - began)
    return statistics.median(times)


def measure(
    runner: ModelRunner,
    ways: Mapping[str, Rows],
    rounds: int,
    clock: Callable[[], float],
    report: Callable[[str], None],
) -> dict[str, list[float]]:
    """Return the times of each round, by way, after a round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, rows in ways.items():
            seconds = step_seconds(runner, rows, clock)
            report(f"round {number}, {name}: {seconds * 1000:.2f} ms a step")
            if number:
                found[name].append(seconds)
    return found


def table(found: Mapping[str, Sequence[float]]) -> str:
    """Return the table: medians, and speeds beside the way without adapters of the same round."""
    lines = ["| adapters | ms a step | speed beside none |", "|---|---|---|"]
    for name, times in found.items():
        ratio = statistics.median(none / ours for ours, none in zip(times, found["none"], strict=True))
        lines.append(f"| {name} | {statistics.median(times) * 1000:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Make model and adapters, measure, and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=SHAPES, default="135m")
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments.add_argument(
        "--stored", choices=["float32", "float16", "bfloat16"], default="bfloat16", help="type of the adapters"
    )
    arguments.add_argument("--compile", choices=["auto", "none", "layers"], default="auto")
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=0)
    arguments.add_argument("--processor-time", action="store_true", help="for a machine that others use, too")
    given = arguments.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    model = make_model(SHAPES[given.shape]).to(dtype).eval()
    stored = getattr(torch, given.stored)
    adapters = [random_adapter(linear_shapes(model), given.rank, stored, seed) for seed in range(4)]
    runner = create_torch_runner(model, length=2 * KEYS, slots=ROWS, free_bytes=2**31)
    select_executor(runner, given.compile)
    for row in range(ROWS):
        runner.forward([Segment(row, 0, [row] * KEYS)], [False])
    clock = time.process_time if given.processor_time else time.perf_counter
    found = measure(runner, shares(adapters), given.rounds, clock, lambda line: print(line, file=sys.stderr))
    print(f"{describe()}, {torch.get_num_threads()} threads")
    compiled = runner.compiled or "nothing"
    print(f"{given.dtype}, adapters in {given.stored}, rank {given.rank}, compiled: {compiled}\n\n{table(found)}")


if __name__ == "__main__":
    main()
