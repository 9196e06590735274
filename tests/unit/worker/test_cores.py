"""How many threads a model gets."""

import os

import pytest

from app.worker.process import usable_cores


def test_a_system_that_does_not_tell_which_cores_are_ours_gives_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Linux knows an affinity; elsewhere the machine's cores are counted."""
    assert usable_cores() == len(os.sched_getaffinity(0))

    monkeypatch.delattr(os, "sched_getaffinity")

    assert usable_cores() == os.cpu_count()
