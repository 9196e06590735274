"""The wheel: built from the project, it serves the embedded model from any folder."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from app import __version__

ROOT = Path(__file__).parents[3]
LOADED = """
import json
import app
from app.config import load_settings
settings = load_settings()
print(json.dumps([app.__file__, app.__version__, settings.model.name, str(settings.app.prompts_dir)]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder / "site")
    return folder / "site"


def test_it_brings_the_embedded_model_and_the_prompts_and_no_training(installed: Path):
    brought = installed / "app/embedded"

    model = {file.name for file in (ROOT / "models/tiny-chat").iterdir() if file.is_file()}
    assert model == {file.name for file in (brought / "models/tiny-chat").iterdir()}
    prompts = {str(file.relative_to(ROOT / "prompts")) for file in (ROOT / "prompts").rglob("*.txt")}
    assert prompts == {str(file.relative_to(brought / "prompts")) for file in (brought / "prompts").rglob("*.txt")}
    native = ROOT / "app/worker/execution/native"
    assert {file.name for file in native.glob("*.[hc]*")} == {
        file.name for file in (installed / native.relative_to(ROOT)).glob("*.[hc]*")
    }


def test_what_it_brings_is_found_from_any_folder(installed: Path, tmp_path: Path):
    found = subprocess.run(
        [sys.executable, "-c", LOADED],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )

    package = str(installed / "app")
    assert [
        f"{package}/__init__.py",
        __version__,
        f"{package}/embedded/models/tiny-chat",
        f"{package}/embedded/prompts",
    ] == json.loads(found.stdout)
