"""What a grammar costs a step of 32 rows: none, one and all of them with it, in turns.

    python -m bench.grammar [--shape 135m|tiny] [--rounds 5] [--threads 0]

Prints a table for docs/performance.md.  The worker's own runner works in this process, on the model of `bench.model`.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from app.ipc.messages import Submit, TokenEvent
from app.types import Grammar, SamplingParams
from app.worker.process import Runner
from bench.runners import load_runner, make_model
from bench.words import token_ids

ROWS, PROMPT = 32, 16
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
        "since": {"type": "string", "format": "date-time"},
        "kind": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age", "tags", "since", "kind"],
    "additionalProperties": False,
}
GRAMMAR = Grammar("json_schema", json.dumps({"type": "array", "items": PERSON, "minItems": 100}))
COUNTS = (0, 1, ROWS)
"""Rows with the grammar."""


def step_seconds(runner: Runner, with_grammar: int, seed: int, *, tokens: int, clock: Callable[[], float]) -> float:
    """Return the median time of a step in which all rows decode."""
    draw, events, times = random.Random(seed), list[TokenEvent](), list[float]()
    for number in range(ROWS):
        grammar = GRAMMAR if number < with_grammar else None
        params = SamplingParams(max_tokens=tokens, temperature=0.8, seed=seed, ignore_eos=True, grammar=grammar)
        # Ids are never used twice.
        request_id = seed * 1000 + with_grammar * 100 + number
        runner.submit(Submit(request_id, token_ids(draw, PROMPT), params))
    while runner.busy:
        before, began = len(events), clock()
        runner.step(events.extend)
        if sum(len(event.token_ids) for event in events[before:]) == ROWS:
            times.append(clock() - began)
    return statistics.median(times)


def measure(
    runner: Runner, rounds: int, step: Callable[[Runner, int, int], float], report: Callable[[str], None]
) -> dict[int, list[float]]:
    """Return the times of each round, by rows with a grammar, after a round that does not count."""
    found: dict[int, list[float]] = {count: [] for count in COUNTS}
    for number in range(rounds + 1):
        for count in COUNTS:
            seconds = step(runner, count, number + 1)
            report(f"round {number}, {count} rows with a grammar: {seconds * 1000:.2f} ms a step")
            if number:
                found[count].append(seconds)
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", default="135m")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=0)
    arguments.add_argument("--torch-only", action="store_true", help="do not choose the fastest way of execution")
    arguments.add_argument("--tokens", type=int, default=48)
    arguments.add_argument("--processor-time", action="store_true", help="for a machine that others use, too")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), given.shape)
        compiled = "none" if given.torch_only else "auto"
        runner = load_runner(model, threads=given.threads, compile=compiled)
        clock = time.process_time if given.processor_time else time.perf_counter
        step = partial(step_seconds, tokens=given.tokens, clock=clock)
        found = measure(runner, given.rounds, step, lambda line: print(line, file=sys.stderr))
    print("| rows with a grammar, of 32 | ms a step | beside none |\n|---|---|---|")
    for count, times in found.items():
        ratio = statistics.median(ours / none for ours, none in zip(times, found[0], strict=True))
        print(f"| {count} | {statistics.median(times) * 1000:.1f} | {ratio - 1:+.1%} |")


if __name__ == "__main__":
    main()
