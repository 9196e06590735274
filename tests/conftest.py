"""What all tests share: a machine with busy cores is no reason to fail a property, and reports cross processes."""

import gc
import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from app.config.older_names import OLDER_VARIABLES
from tests.examples import QUICK, THOROUGH

# Read by torch when it is imported.  Models this small are slower on several threads, and two tests run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read by the settings, and set on many machines for something else.
for _name in OLDER_VARIABLES:
    os.environ.pop(_name, None)
settings.register_profile(QUICK, max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(THOROUGH, settings.get_profile(QUICK), max_examples=100)
settings.load_profile(QUICK)


@pytest.hookimpl(trylast=True)  # after Hypothesis has marked what is its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measure no coverage where the same lines run for example after example: it takes as long as the test itself."""
    for item in items:
        if item.get_closest_marker("hypothesis"):
            item.add_marker(pytest.mark.no_cover)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave modules and test items out of the garbage collector's rounds: they stay until the end, and are many."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape lone surrogates in what a test wrote: no report with one reaches the process that collects them."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report
