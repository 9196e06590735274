"""The embedded model as it lies in the repository: its size, its shape and what its card says of it."""

import json
import re
from pathlib import Path

MODEL = Path(__file__).parents[3] / "models" / "tiny-chat"


def test_the_embedded_model_is_small_and_of_the_promised_shape() -> None:
    """Under 12 MB in all, a Llama with a window of 2,048 tokens, safe weights only."""
    config = json.loads((MODEL / "config.json").read_text())

    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 12_000_000
    assert ("llama", 2048) == (config["model_type"], config["max_position_embeddings"])
    assert [] == [file.name for file in MODEL.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


SHORT = {
    "recall: a name 1,500 tokens ago",
    "calls a tool for the weather",
    "calls a tool for a capital, under another name",
    "calls a tool for the weather, under another name",
    "calls the right one of three functions of one string, names made up",
    "answers by itself what no offered tool is for",
    "JSON object of what was told before",
}
"""Figures that are known to fall short of their target; a better model takes lines away here and adds none."""


def test_the_embedded_models_card_marks_what_falls_short_and_nothing_else_does() -> None:
    """`models/tiny-chat/training/evaluate.py --write-card` writes the rows; each is marked by its own numbers."""
    card = (MODEL / "README.md").read_text()
    rows = re.findall(r"^\| (.+?) \| ([\d.]+)% \| ([\d.]+)%(.*?) \|", card, re.MULTILINE)

    assert 46 == len(rows)
    assert SHORT == {name for name, _, _, mark in rows if mark == " (missed)"}
    assert SHORT == {name for name, target, measured, _ in rows if float(measured) < float(target)}
