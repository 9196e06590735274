"""Write the mean of two models' weights, which is often better than either where one was trained from the other.

    python models/tiny-chat/training/average.py FOLDER OTHER --out models/tiny-chat

Source: Wortsman et al., Model soups, 2022 (arXiv:2203.05482).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def main() -> None:
    """Read both, average in float32, and write in the type of the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a model")
    parser.add_argument("other", type=Path, help="folder of one that was trained from it, or beside it")
    parser.add_argument("--out", type=Path, required=True, help="folder whose weights are replaced")
    arguments = parser.parse_args()
    first, second = load_file(arguments.folder / WEIGHTS), load_file(arguments.other / WEIGHTS)
    mean = {name: ((one.float() + second[name].float()) / 2).to(one.dtype) for name, one in first.items()}
    save_file(mean, arguments.out / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
