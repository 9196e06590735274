"""The wheel, installed by pip in an environment of its own: it serves from a foreign folder, where its data stays."""

import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ROOT
from tests.ports import free_port
from tests.waiting import wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """`llm-service` of the built wheel; its libraries are those of the environment that runs the tests."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    install = [sys.executable, "-m", "pip", f"--python={tmp_path / 'venv'}", "install", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=60)
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    # Read after the environment's own, so that the editable installation of this checkout is never found first.
    (site / "libraries.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")))
    return tmp_path / "venv" / "bin" / "llm-service"


def test_the_wheel_serves_chat_page_and_documentation_from_an_empty_folder(program: Path, tmp_path: Path) -> None:
    """With what it brings: the embedded model, the prompts, the page.  Key and database are in the folder; it stops."""
    folder, port = tmp_path / "elsewhere", free_port()
    folder.mkdir()
    bare = {name: value for name, value in os.environ.items() if "__" not in name and name != "PYTHONPATH"}
    settings = {"MODEL__THREADS": "1", "MODEL__SPARE_WORKER": "false", "MODEL__COMPILE": "none"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(program), "serve", "--port", str(port)], cwd=folder, env=bare | settings, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            wait_for(lambda: _is_ready(http, process, folder / "log"), 100)
            key = (folder / "data" / "api_key").read_text().strip()
            question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
            answer = http.post("/v1/chat", json=question, headers={"X-API-Key": key}).json()
            pages = {path: http.get(path, headers={"Accept": "text/html"}) for path in ("/", "/docs", "/openapi.json")}
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    finally:
        process.kill()
        process.wait(10)
    imported = subprocess.run(
        [str(program.parent / "python"), "-c", "import app; print(app.__file__)"],
        cwd=folder,
        env=bare,
        capture_output=True,
        text=True,
    )

    assert str(program.parents[1]) in imported.stdout, imported
    assert "The capital of France is Paris." == answer["message"]["content"]
    assert [200] * 3 == [page.status_code for page in pages.values()]
    assert {"text/html"} == {pages[path].headers["content-type"].partition(";")[0] for path in ("/", "/docs")}
    assert {"data", "log"} == {path.name for path in folder.iterdir()}
    assert {"api_key", "service.db"} <= {path.name for path in (folder / "data").iterdir()}
    assert 0 == code
    assert "Traceback" not in (folder / "log").read_text()


def _is_ready(http: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False
