"""Compare the first token of a conversation's tenth turn with that of its first, with more conversations than rows.

    python -m bench.conversations [--shape 135m|tiny] [--sessions 64] [--rows 32] [--turns 10] [--cached]

The conversations take turns, so that each finds another in its place; all begin with the same system text.  Every turn
is measured in a runner with the prefix cache and, one after the other, in one without it, but with --cached only in the
former.  Prints a table for docs/performance.md.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from app.ipc.messages import Submit, TokenEvent
from app.types import SamplingParams
from app.worker.process import Runner
from bench.machine import describe
from bench.runners import load_runner, make_model
from bench.words import token_ids

SYSTEM, QUESTION, ANSWER = 100, 40, 16
"""Tokens."""
CACHE_BYTES = {"with": 2 * 1024**3, "without": 0}


class Conversations:
    """All conversations over one runner."""

    def __init__(self, runner: Runner, sessions: int) -> None:
        draw = random.Random(1)
        system = token_ids(draw, SYSTEM)
        self._runner = runner
        self._draws = [random.Random(number) for number in range(sessions)]
        self._prompts = [list(system) for _ in range(sessions)]
        self._requests = 0

    def turn(self) -> float:
        """Give each its next turn, one after the other; return the median time to the first token, in seconds."""
        return statistics.median(self._answer(number) for number in range(len(self._prompts)))

    def _answer(self, number: int) -> float:
        prompt, events = self._prompts[number], list[TokenEvent]()
        prompt += token_ids(self._draws[number], QUESTION)
        self._requests += 1
        params = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        self._runner.submit(Submit(self._requests, tuple(prompt), params))
        while not any(event.token_ids for event in events):
            self._runner.step(events.extend)
        first = time.perf_counter() - began
        while self._runner.busy:
            self._runner.step(events.extend)
        prompt += [token for event in events for token in event.token_ids]
        # As a worker does before it waits for the next message.
        while self._runner.save_ahead():
            pass
        return first


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", default="135m")
    arguments.add_argument("--sessions", type=int, default=64)
    arguments.add_argument("--rows", type=int, default=32)
    arguments.add_argument("--turns", type=int, default=10)
    arguments.add_argument("--cached", action="store_true", help="measure only with the prefix cache")
    given = arguments.parse_args()
    sizes = {name: size for name, size in CACHE_BYTES.items() if size or not given.cached}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), given.shape)
        runners = {
            name: load_runner(model, max_batch_size=given.rows, prefix_cache_bytes=size) for name, size in sizes.items()
        }
        conversations = {name: Conversations(runner, given.sessions) for name, runner in runners.items()}
        times: dict[str, list[float]] = {name: [] for name in sizes}
        for turn in range(given.turns):
            for name, each in conversations.items():
                times[name].append(each.turn())
                print(f"turn {turn + 1}, {name} the cache: {times[name][-1] * 1000:.1f} ms", file=sys.stderr)
    print(f"{describe()}\n\n| prefix cache | turn 1, ms | turn {given.turns}, ms | ratio |\n|---|---|---|---|")
    for name, spent in times.items():
        print(f"| {name} | {spent[0] * 1000:.1f} | {spent[-1] * 1000:.1f} | {spent[-1] / spent[0]:.2f} |")


if __name__ == "__main__":
    main()
