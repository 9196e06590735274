"""`python start_api.py --log-level INFO`, from this folder: serves with the configuration of the folder above."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    from app.cli import serve_only
    from serving import read_variables

    read_variables()
    serve_only()
