"""The garbage collector stays away from imports, and from what they leave."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from app.garbage import imports_uncollected

ROOT = Path(__file__).parents[2]
UNTIL_AN_IMPORT = """
import gc, os, runpy, sys

module, package, *sys.argv[1:] = sys.argv[1:]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            print("collected" if gc.isenabled() else "uncollected", file=sys.stderr, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder())
runpy.run_module(package, run_name="__main__")
"""
"""Runs a package until it is about to import a module, and says then whether garbage is collected."""


def test_what_was_imported_is_left_out_of_later_rounds():
    """What comes later is collected as usual."""
    before = gc.get_freeze_count()

    with imports_uncollected():
        enabled = gc.isenabled()
        imported: list[list[int]] = [[] for _ in range(1000)]

    assert (False, True) == (enabled, gc.isenabled())
    assert gc.get_freeze_count() >= before + len(imported)


def test_an_import_that_fails_leaves_the_collector_on():
    def fail() -> None:
        with imports_uncollected():
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()


def test_who_collects_no_garbage_is_left_to_it():
    gc.disable()
    try:
        with imports_uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("module", "command"),
    [("app.cli", ["app"]), ("app.server", ["app", "serve"]), ("app.worker.process", ["app.worker", "folder"])],
)
def test_no_garbage_is_collected_while_a_service_or_worker_imports(module: str, command: list[str]):
    """It would take a fifth of the time."""
    program = [sys.executable, "-c", UNTIL_AN_IMPORT, module, *command]

    with subprocess.Popen(program, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.read()

    assert "uncollected\n" == said
