"""Run the tests of the Triton kernels, interpreted on the CPU and compiled for GPUs: `make test-triton`.

Triton is no dependency of the project: torch's wheels for GPUs bring it along.  Here it gets an environment of its own
in `.cache`, which finds everything else in the project's.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import filelock

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"


def version() -> str:
    """Return the version of Triton that goes with the locked torch."""
    found = re.search(r"^triton==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, "constraints.txt names no Triton"
    return found[1]


def installed() -> Path:
    """Return the Python that has Triton, after installing it if need be (700 MB)."""
    CACHE.mkdir(exist_ok=True)
    folder = CACHE / f"triton-{version()}-python{sys.version_info[0]}.{sys.version_info[1]}"
    python = folder / "bin" / "python"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "installed").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
            pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "--no-deps", f"triton=={version()}"], check=True)
            packages = next((folder / "lib").glob("python*/site-packages"))
            (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
            (folder / "installed").touch()
    return python


def main() -> int:
    """Return the exit status of the tests."""
    command = [str(installed()), "-m", "pytest", "--no-cov", "-m", "triton", "-n", "2", "tests/triton", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
