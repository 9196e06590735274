"""The commands of CustomLLM Inference API, an older service: each starts this one (docs/compat.md).

Its variables may stand in `serving/.env`, beside the project's own `.env`; those of the environment count before both.
"""

from pathlib import Path

from dotenv import load_dotenv

FOLDER = Path(__file__).resolve().parent


def read_variables() -> None:
    """Add the variables of `serving/.env` to the environment, where it has none of their names."""
    load_dotenv(FOLDER / ".env")
