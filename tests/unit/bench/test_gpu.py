"""The bench of a GPU: every part runs from end to end on a processor, and the table says what was found."""

import json
import sys
from pathlib import Path

import pytest

from bench import gpu, gpu_parts


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("steps", "step"),
        ("synchronous", "step"),
        ("equality", "equality"),
        ("memory", "memory back"),
        ("attention", "attention"),
    ],
)
def test_every_part_runs_dry(part: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the passes that a GPU captures."""
    results = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench.gpu_parts", part, str(results), "--dry"])

    gpu_parts.main()

    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [] == [line for line in found if line["what"] == "failed"]
    assert what in {line["what"] for line in found}
    assert {"graphs"} == {line["compiled"] for line in found if "compiled" in line} or part in {
        "memory",
        "synchronous",
        "attention",
    }
    assert all(line["single"] == line["prompts"] == line["batched"] for line in found if line["what"] == "equality")


def test_the_table_has_steps_beside_answers() -> None:
    step = {"part": "steps", "shape": "1b", "what": "step", "rows": 8, "ms": 3.0, "busy_ms": 2.0, "over_busy": 1.5}
    answers = {"part": "steps", "shape": "1b", "what": "answers", "rows": 8, "tokens_s": 900.0, "first_s": 0.02}
    peer = {"part": "peers", "shape": "1b", "what": "peer", "peer": "static loop", "rows": 8, "tokens_s": 250.0}
    failed = {"part": "peers", "shape": "1b", "what": "failed", "of": "graphs", "error": "RuntimeError: no"}

    lines = list(gpu.report([step, answers, peer, failed]))

    assert "| steps 1b | 8 | 3.0 | 2.0 | 1.5 | 900.0 | 0.02 |" in lines
    assert "| static loop 1b | 8 | | | | 250.0 | |" in lines
    assert '- peers 1b, failed: {"of": "graphs", "error": "RuntimeError: no"}' == lines[-1]


def test_a_part_that_dies_is_reported(tmp_path: Path) -> None:
    """And the others are measured all the same."""
    assert "its process ended with 2" == gpu.run_part("nothing", tmp_path / "gpu.jsonl", [], 60)
