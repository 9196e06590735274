"""Measure the engine on a GPU: steps, answers and prompts, beside transformers in the same run.

    python -m bench.gpu [PART ...] [--shape 1b|8b] [--budget SECONDS] [--out FOLDER] [--dry]

Parts: steps (as the service would choose), synchronous (each step is read before the next is launched), uncaptured
(`compile: none`), compiled (`compile: layers`), peers, equality, memory, attention; without any, all of them in this
order.  Each is a process of its own, which ends at the budget's end: a part that loses the device takes no other with
it.  Results are appended to FOLDER/gpu.jsonl as they come, and printed as a table at the end.  `--dry` tries it all on
a processor with a tiny model.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.process import ROOT

PARTS = ("steps", "synchronous", "uncaptured", "compiled", "peers", "equality", "memory", "attention")
MIN_SECONDS = 10
"""A part is not begun with less left."""


def run_part(part: str, results: Path, options: Sequence[str], seconds: float) -> str | None:
    """Run a part in a process; return why it failed, or None."""
    command = [sys.executable, "-m", "bench.gpu_parts", part, str(results), *options]
    try:
        ended = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"it was not finished after {seconds:.0f} s"
    return None if ended.returncode == 0 else f"its process ended with {ended.returncode}"


def report(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table of steps and answers, and a line for every other result."""
    yield "| part | rows | step ms | GPU busy ms | step / busy | tokens/s | last first token s |"
    yield "|---|---|---|---|---|---|---|"
    answers = {(each["part"], each["shape"], each["rows"]): each for each in lines if each["what"] == "answers"}
    for line in lines:
        if line["what"] == "step":
            whole = answers.get((line["part"], line["shape"], line["rows"]), {})
            figures = [line["rows"], line["ms"], line["busy_ms"], line["over_busy"]]
            figures += [whole.get("tokens_s"), whole.get("first_s")]
            cells = " | ".join("" if each is None else str(each) for each in figures)
            yield f"| {line['part']} {line['shape']} | {cells} |"
        elif line["what"] == "peer":
            yield f"| {line['peer']} {line['shape']} | {line['rows']} | | | | {line['tokens_s']} | |"
    yield ""
    for line in lines:
        if line["what"] not in {"step", "answers", "peer"}:
            rest = {name: value for name, value in line.items() if name not in {"part", "what", "shape"}}
            yield f"- {line['part']} {line['shape']}, {line['what']}: {json.dumps(rest)}"


def main() -> None:
    """Run the parts one after the other, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--shape", choices=["1b", "8b"], default="1b")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all parts together")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    given.out.mkdir(parents=True, exist_ok=True)
    results, end = (given.out / "gpu.jsonl").resolve(), time.monotonic() + given.budget
    options = ["--shape", given.shape, *(["--dry"] if given.dry else [])]
    for part in given.parts or PARTS:
        left = end - time.monotonic()
        failure = run_part(part, results, options, left) if left > MIN_SECONDS else "there was no time left for it"
        if failure:
            print(f"{part}: {failure}", file=sys.stderr)
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    print("\n".join(report(lines)))


if __name__ == "__main__":
    main()
