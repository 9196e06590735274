"""The compiler that tests of native kernels need, and how long ways of execution are measured."""

import os
import shutil

import pytest

from app.worker.execution import timing_cache, way_timing
from app.worker.execution.native.native_build import COMPILERS


@pytest.fixture(scope="session")
def compiler() -> str:
    """The path of a C++ compiler.  REQUIRE_SERVICES, which CI sets, turns its absence into a failure."""
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        reason = "there is no C++ compiler on this machine (Debian: apt-get install g++)"
        if os.environ.get("REQUIRE_SERVICES"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no more rounds than have to be: which way is the fastest for a tiny model is no matter.

    And keep nothing: a test that breaks a way would find what another measured of it.
    """
    monkeypatch.setattr(way_timing, "BUDGET_SECONDS", 0)
    monkeypatch.setattr(timing_cache, "in_code_folder", lambda use: None)
