"""The tests that only targets of their own run: all that they ask for is there, though `make test` never runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import START_SECONDS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", ["clients", "upstreams"])
def test_every_fixture_of_a_long_target_is_found(target: str):
    """Planned and not run: what they install takes minutes."""
    command = [sys.executable, "-m", "pytest", "--setup-plan", "-q", "--no-cov", "-p", "no:cacheprovider", "-m", target]
    planned = subprocess.run(
        [*command, f"tests/{target}"], cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS
    )
    assert 0 == planned.returncode, planned.stdout[-2000:]
    assert "SETUP" in planned.stdout
