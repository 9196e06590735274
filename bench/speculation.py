"""What speculation gains on text that repeats, and costs on text that does not, with one request at a time.

    python -m bench.speculation [--shape 135m|tiny] [--rounds 5] [--tokens 192]

Both runners do the same requests in turns.  Text that repeats is the greedy completion of a random model, which goes
round in circles as an edit of code or a quotation does; text that does not is sampled.  Prints a table for
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

PROMPT = 105
TEMPERATURES = {"repeats": 0.0, "does not": 1.0}


def seconds_per_token(runner: Runner, number: int, temperature: float, tokens: int) -> tuple[float, tuple[int, ...]]:
    """Return how long a token takes after the first one, and the completion."""
    prompt = token_ids(random.Random(number), PROMPT)
    params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=number, ignore_eos=True)
    events = list[TokenEvent]()
    runner.submit(Submit(int(temperature * 1000) + number, tuple(prompt), params))
    while not any(event.token_ids for event in events):
        runner.step(events.extend)
    began = time.perf_counter()
    while runner.busy:
        runner.step(events.extend)
    seconds = time.perf_counter() - began
    return seconds / (tokens - 1), tuple(token for event in events for token in event.token_ids)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", default="135m")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--tokens", type=int, default=192)
    given = arguments.parse_args()
    ratios: dict[str, list[float]] = {name: [] for name in TEMPERATURES}
    plain_ms: dict[str, list[float]] = {name: [] for name in TEMPERATURES}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), given.shape)
        plain, guessing = load_runner(model), load_runner(model, speculation="ngram")
        for number in range(given.rounds + 1):
            for name, temperature in TEMPERATURES.items():
                without, expected = seconds_per_token(plain, number, temperature, given.tokens)
                seconds, completion = seconds_per_token(guessing, number, temperature, given.tokens)
                same = "the same" if completion == expected else "ANOTHER COMPLETION"
                line = f"round {number}, {name}: {without * 1000:.2f} and {seconds * 1000:.2f} ms a token, {same}"
                print(line, file=sys.stderr)
                if number:
                    ratios[name].append(without / seconds)
                    plain_ms[name].append(without * 1000)
    print(f"{describe()}\n\n| text | ms a token without | times as fast with speculation |\n|---|---|---|")
    for name, each in ratios.items():
        print(f"| {name} | {statistics.median(plain_ms[name]):.1f} | {statistics.median(each):.2f} |")


if __name__ == "__main__":
    main()
