"""The bench of adapters: it compares what it says, in turns, and prints a table that a document can take."""

import sys

import pytest
import torch

from app.worker.execution.lora import LoraAdapter
from bench.adapters import ROWS, main, shares, table


def test_rows_are_shared_out_as_the_table_says() -> None:
    adapters = [LoraAdapter(str(number), {}) for number in range(4)]

    found = shares(adapters)

    assert {ROWS} == {len(rows) for rows in found.values()}
    assert [0, 1, 4, 4] == [len({*rows} - {None}) for rows in found.values()]
    assert [8, 0, 4, 0] == [list(rows).count(None) for rows in found.values()]


def test_speeds_are_compared_within_a_round() -> None:
    """A slow second round, slow for both, changes no ratio."""
    lines = table({"none": [0.010, 0.040, 0.010], "some": [0.0125, 0.05, 0.0125]}).splitlines()

    assert "| some | 12.5 | 0.80 |" == lines[-1]


def test_it_runs_from_end_to_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"--shape tiny --compile none --rank 4 --rounds 1 --threads {torch.get_num_threads()}"
    monkeypatch.setattr(sys, "argv", ["bench.adapters", *options.split()])

    main()

    printed = capsys.readouterr().out
    assert "float32, adapters in bfloat16, rank 4, compiled: nothing" in printed
    assert "| none | " in printed
    assert "| 4 adapters, 8 rows | " in printed
