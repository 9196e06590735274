"""Compare the first token of a conversation's tenth turn with that of its first, with more conversations than rows.

    python -m bench.conversations [--shape 135m|tiny] [--sessions 64] [--rows 32] [--turns 10] [--cached]

The conversations take turns, so that each finds another in its place; all begin with the same system text.  Between the
last turns as many others begin: a machine that is slower a minute later is slower for both.  Measured in a runner with
the prefix cache and then in one without it, but with --cached only in the former.  Prints a table for
docs/performance.md.
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
    """Some conversations over one runner."""

    def __init__(self, runner: Runner, sessions: int, *, first: int = 0) -> None:
        """Args: first: the number of the first one; others say other things."""
        system = token_ids(random.Random(1), SYSTEM)
        self._runner = runner
        self._draws = [random.Random(first + number) for number in range(sessions)]
        self._prompts = [list(system) for _ in range(sessions)]

    def answer(self, number: int) -> float:
        """Give a conversation its next turn; return the time to the first token, in seconds."""
        prompt, events = self._prompts[number], list[TokenEvent]()
        prompt += token_ids(self._draws[number], QUESTION)
        params = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        self._runner.submit(Submit(1, tuple(prompt), params))
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


def measure(runner: Runner, sessions: int, turns: int) -> tuple[float, float]:
    """Return the median times to the first token of first turns and of last turns, in seconds."""
    conversations = Conversations(runner, sessions)
    for turn in range(turns - 1):
        median = statistics.median(conversations.answer(number) for number in range(sessions))
        print(f"turn {turn + 1}: {median * 1000:.1f} ms", file=sys.stderr)
    others = Conversations(runner, sessions, first=sessions)
    pairs = [(others.answer(number), conversations.answer(number)) for number in range(sessions)]
    first, last = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(last)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", default="135m")
    arguments.add_argument("--sessions", type=int, default=64)
    arguments.add_argument("--rows", type=int, default=32)
    arguments.add_argument("--turns", type=int, default=10)
    arguments.add_argument("--cached", action="store_true", help="measure only with the prefix cache")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), given.shape)
        times = {
            name: measure(
                load_runner(model, max_batch_size=given.rows, prefix_cache_bytes=size), given.sessions, given.turns
            )
            for name, size in CACHE_BYTES.items()
            if size or not given.cached
        }
    print(f"{describe()}\n\n| prefix cache | turn 1, ms | turn {given.turns}, ms | ratio |\n|---|---|---|---|")
    for name, (first, last) in times.items():
        print(f"| {name} | {first * 1000:.1f} | {last * 1000:.1f} | {last / first:.2f} |")


if __name__ == "__main__":
    main()
