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


def test_the_embedded_models_card_shows_every_figure_and_none_missed() -> None:
    """`scripts/evaluate_tiny_chat.py --write-card` marks what falls short; nothing with a target does."""
    card = (MODEL / "README.md").read_text()
    rows = re.findall(r"^\| (.+?) \| ([\d.]+)% \| ([\d.]+)%(.*?) \|", card, re.MULTILINE)

    assert 12 <= len(rows)
    assert "(missed)" not in card.split("<!-- figures -->")[1]
    assert all(float(measured) >= float(target) for _, target, measured, _ in rows)
