"""Write the weighted mean of several models' weights, often better than each where all were trained from one of them.

    python models/tiny-chat/training/average.py FOLDER=4 OTHER=3 THIRD=3 --out models/tiny-chat

Source: Wortsman et al., Model soups, 2022 (arXiv:2203.05482).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def share(text: str) -> tuple[Path, float]:
    """Return the folder and the weight that an argument names, 1 without one."""
    folder, _, weight = text.partition("=")
    return Path(folder), float(weight or 1)


def main() -> None:
    """Read all, average in float32, and write in the type of the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=share, metavar="FOLDER[=WEIGHT]", help="folder of a model")
    parser.add_argument("--out", type=Path, required=True, help="folder whose weights are replaced")
    arguments = parser.parse_args()
    loaded = [(load_file(folder / WEIGHTS), weight) for folder, weight in arguments.models]
    total = sum(weight for _, weight in loaded)
    mean = {
        name: (sum(weights[name].float() * weight for weights, weight in loaded) / total).to(first.dtype)
        for name, first in loaded[0][0].items()
    }
    save_file(mean, arguments.out / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
