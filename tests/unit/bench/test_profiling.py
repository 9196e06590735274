import cProfile
import json
from pathlib import Path

import pytest

from bench.process import ROOT
from bench.profiling import GENERATED, STANDARD_LIBRARY, as_markdown, module_of, read_stacks, read_stats

SITE = "/somewhere/.venv/lib/python3.11/site-packages"


@pytest.mark.parametrize(
    ("filename", "module"),
    [
        (str(ROOT / "app/web/http/sse.py"), "app.web.http.sse"),
        (str(ROOT / "app/web/__init__.py"), "app.web"),
        (str(ROOT / ".venv/lib/python3.11/site-packages/pydantic/main.py"), "pydantic.main"),
        (f"{SITE}/langchain_core/runnables/base.py", "langchain_core.runnables.base"),
        (f"{SITE}/uvicorn/protocols/http/httptools_impl.py", "uvicorn.protocols.http"),
        (f"{SITE}/six.py", "six"),
        (str(STANDARD_LIBRARY / "asyncio/events.py"), "asyncio"),
        ("<string>", GENERATED),
        ("<frozen abc>", "<frozen abc>"),
    ],
)
def test_a_source_file_is_named_as_its_module(filename: str, module: str):
    assert module == module_of(filename)


def test_samples_count_for_the_innermost_module_and_for_every_function_on_the_stack():
    sse, routing = f"read ({ROOT}/app/web/http/sse.py)", f"app ({SITE}/fastapi/routing.py)"

    profile = read_stacks([f"{routing};{sse} 3", f"{routing} 1", f"{routing};{sse};{sse} 4"])

    assert {"app.web.http.sse": 7 / 8, "fastapi.routing": 1 / 8} == profile.own
    assert {"app.web.http.sse:read": 7 / 8, "fastapi.routing:app": 1.0} == profile.total
    assert {"app.web": 7 / 8, "fastapi": 1 / 8} == profile.by_package()


def test_a_builtin_function_counts_for_the_module_that_calls_it(tmp_path: Path):
    recorder = cProfile.Profile()
    recorder.runcall(lambda: [json.loads("[1, 2, 3]") for _ in range(100)])
    recorder.dump_stats(tmp_path / "profile")

    profile = read_stats(tmp_path / "profile")

    assert 1.0 == pytest.approx(sum(profile.own.values()))
    assert profile.own["json"] > 0
    assert "~" not in profile.own


def test_a_page_shows_what_each_share_is_of_a_request():
    profile = read_stacks([f"app ({SITE}/fastapi/routing.py) 1", f"run ({SITE}/typer/main.py) 3"])

    page = as_markdown(profile, "whole", cpu_us=2000)

    assert "| fastapi | 25.0 | 500 |" in page
    assert "| fastapi.routing:app | 25.0 | 500 |" in page
    assert "typer.main:run" not in page
