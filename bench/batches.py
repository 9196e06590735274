"""Measure what a running batch costs a live request, through the whole service.

    python -m bench.batches [--model FOLDER | --shape 135m] [--rounds 6] [--requests 6] [--lines 1000]

In each round live requests are sent one after the other, with pauses in which a batch has the model to itself: first
without a batch, then beside one of --lines chat requests, which is cancelled afterwards.  Prints the medians over all
rounds, and their ratios; only the ratios say something about another machine.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from bench import machine
from bench.peers import DEADLINES, Ours
from bench.process import KEY, ROOT, free_port, our_command, our_environment, serving, stop_on_sigterm
from bench.serve import prepare_model
from bench.wire import TimedResponse, send

TARGET = 1.3
"""How many times as long a live request may take beside a batch."""
COMPLETION_TOKENS = 48
LINE_TOKENS = 64
PAUSE_SECONDS = 0.1, 0.3
"""Between two live requests, drawn."""
FIRST_LINES = 8
"""Lines of a batch that are answered before live requests are measured beside it."""
PATIENCE_SECONDS = 60.0
SENTENCES = (
    "The cat sat by the window and looked at the rain.",
    "What is the capital of France?",
    "Tell me a story about a clever rabbit.",
    "My name is Tovin and I live near the sea.",
    "Please explain why the sky is blue.",
    "How many days are there in a week?",
)


class BatchFailed(Exception):
    """The service did not do with a batch what it should."""


@dataclass(frozen=True)
class Figures:
    """Medians of live requests, in ms, and how many lines of a batch were answered meanwhile."""

    total_ms: float
    first_token_ms: float
    between_ms: float
    lines_per_second: float = 0.0

    @classmethod
    def median(cls, rounds: Sequence["Figures"]) -> "Figures":
        """Return the median of each figure on its own."""
        return cls(*(statistics.median(getattr(each, name) for each in rounds) for name in cls.__annotations__))


class Batches:
    """The batches of one service."""

    def __init__(self, port: int, lines: int) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": KEY}, timeout=60)
        self._lines = lines

    def start(self, draw: random.Random) -> str:
        """Create a batch and wait until it is running; return its id."""
        body = "\n".join(json.dumps(line(draw, number)) for number in range(self._lines))
        headers = {"Content-Type": "application/jsonl"}
        created = self._http.post("/v1/batches", content=body, headers=headers)
        created.raise_for_status()
        batch_id = created.json()["id"]
        self._wait(batch_id, lambda batch: batch["request_counts"]["completed"] >= min(FIRST_LINES, self._lines - 1))
        return str(batch_id)

    def answered(self, batch_id: str) -> int:
        """Return how many lines of a running batch have a response.

        Raises: BatchFailed: it has ended, or a line has failed.
        """
        batch = self._read(batch_id)
        if batch["status"] != "in_progress" or batch["request_counts"]["failed"]:
            raise BatchFailed(f"it is {batch['status']} with {batch['request_counts']}; --lines says how many it has")
        return int(batch["request_counts"]["completed"])

    def cancel(self, batch_id: str) -> None:
        """Cancel a batch and wait for its end."""
        self._http.post(f"/v1/batches/{batch_id}/cancel").raise_for_status()
        self._wait(batch_id, lambda batch: batch["status"] == "cancelled")

    def _read(self, batch_id: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._http.get(f"/v1/batches/{batch_id}").raise_for_status().json()
        return found

    def _wait(self, batch_id: str, is_met: Callable[[Mapping[str, Any]], bool]) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not is_met(batch := self._read(batch_id)):
            if time.monotonic() > until:
                raise BatchFailed(f"after {PATIENCE_SECONDS:.0f} s it is {batch['status']}: {batch['request_counts']}")
            time.sleep(0.1)


def line(draw: random.Random, number: int) -> dict[str, Any]:
    """Return one line of a batch; no two are alike."""
    text = f"{number}. {' '.join(draw.choices(SENTENCES, k=draw.choice((1, 2, 5))))}"
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": LINE_TOKENS, "ignore_eos": True}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def live(port: int, draw: random.Random) -> TimedResponse:
    """Send one live request; its prompt is like no other's."""
    text = f"{draw.random()} {' '.join(draw.choices(SENTENCES, k=3))}"
    return asyncio.run(send(port, Ours().post("/v1/generate", {"prompt": text}, COMPLETION_TOKENS), Ours().parse))


def measure(port: int, requests: int, draw: random.Random) -> Figures:
    """Send live requests, one after the other."""
    responses = list[TimedResponse]()
    for _ in range(requests):
        time.sleep(draw.uniform(*PAUSE_SECONDS))
        responses.append(live(port, draw))
    return Figures(
        total_ms=1000 * statistics.median(each.ended - each.began for each in responses),
        first_token_ms=1000 * statistics.median(each.first_token for each in responses),
        between_ms=1000 * statistics.median(gap for each in responses for gap in each.gaps),
    )


def measure_beside(port: int, requests: int, draw: random.Random, lines: int) -> Figures:
    """Send live requests while a batch runs."""
    batches = Batches(port, lines)
    batch_id = batches.start(draw)
    before, began = batches.answered(batch_id), time.monotonic()
    figures = measure(port, requests, draw)
    per_second = (batches.answered(batch_id) - before) / (time.monotonic() - began)
    batches.cancel(batch_id)
    return replace(figures, lines_per_second=per_second)


def run(arguments: argparse.Namespace, port: int) -> tuple[Figures, Figures]:
    """Return the medians without a batch and beside one."""
    draw = random.Random(0)
    baseline, beside = list[Figures](), list[Figures]()
    measure(port, 3, draw)
    for number in range(arguments.rounds):
        baseline.append(measure(port, arguments.requests, draw))
        beside.append(measure_beside(port, arguments.requests, draw, arguments.lines))
        with_batch, without = beside[-1].total_ms, baseline[-1].total_ms
        print(
            f"round {number + 1}: {without:.0f} ms, beside the batch {with_batch:.0f} ms", file=sys.stderr, flush=True
        )
    return Figures.median(baseline), Figures.median(beside)


def as_markdown(baseline: Figures, beside: Figures) -> str:
    """Return the table, and whether the target is met."""
    rows = [
        ("whole response, ms", baseline.total_ms, beside.total_ms),
        ("first token, ms", baseline.first_token_ms, beside.first_token_ms),
        ("between tokens, ms", baseline.between_ms, beside.between_ms),
    ]
    lines = ["| a live request | no batch | beside a batch | ratio |", "|---|---|---|---|"]
    lines += [f"| {name} | {one:.1f} | {other:.1f} | {other / one:.2f} |" for name, one, other in rows]
    ratio = beside.total_ms / baseline.total_ms
    verdict = "met" if ratio <= TARGET else "missed"
    lines += ["", f"Target {TARGET}: {verdict}.  The batch answered {beside.lines_per_second:.1f} lines/s meanwhile."]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-chat", help="a folder; the embedded model")
    model.add_argument("--shape", choices=("135m", "tiny"), help="a generated model of bench.model instead")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=6, help="live requests of each half of a round")
    parser.add_argument("--lines", type=int, default=1000)
    return parser.parse_args(argv)


def main() -> None:
    """Measure, and print a table."""
    stop_on_sigterm()
    arguments = parse()
    model = arguments.model.resolve()
    if arguments.shape:
        model = ROOT / ".cache" / "bench" / f"llama-{arguments.shape}"
        prepare_model(model, arguments.shape)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder, port = Path(name), free_port()
        settings = {"MODEL__NAME": str(model), "MODEL__SOURCE": "local", "MODEL__SPARE_WORKER": "false", **DEADLINES}
        environment = our_environment(folder, settings)
        with serving(our_command(port), port, environment, "/readyz", folder / "service.log"):
            baseline, beside = run(arguments, port)
    print(f"{machine.describe()}\n\n{as_markdown(baseline, beside)}")


if __name__ == "__main__":
    main()
