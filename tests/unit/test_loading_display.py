"""What a start shows of a load that takes its time."""

import asyncio
import sys
from io import StringIO
from typing import Literal

import pytest
from structlog.testing import capture_logs

from app import loading_display
from app.config import ModelConfig
from app.engine.base import LoadProgress
from app.loading_display import show_loading

STATES = [
    LoadProgress("process"),
    LoadProgress("weights", 250_000_000, 500_000_000),
    LoadProgress("weights", 500_000_000, 500_000_000),
    LoadProgress("first token"),
    None,
]


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading_display, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(loading_display, "POLL_SECONDS", 0.12)  # the bar is drawn ten times a second
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def show(model: ModelConfig, terminal: StringIO) -> list[tuple[object, ...]]:
    states = iter(STATES)
    with capture_logs() as lines:
        asyncio.run(show_loading(model, lambda: next(states), terminal))
    return [(line["event"], line.get("stage"), line.get("bytes_done")) for line in lines]


def test_a_terminal_gets_a_bar_with_what_is_done_and_its_bytes():
    terminal = Terminal()

    assert [] == show(ModelConfig(), terminal)

    assert "tiny-chat: starting a process for it" in terminal.getvalue()
    assert "tiny-chat: reading its weights" in terminal.getvalue()
    assert "250.0 MB of 500.0 MB" in terminal.getvalue()
    *_, last = terminal.getvalue().split("computing a first token")
    assert "MB" not in last


def test_what_others_print_beside_the_bar_keeps_its_lines(capsys: pytest.CaptureFixture[str]):
    line = "word " * 60
    states = iter([LoadProgress("weights"), LoadProgress("weights"), None])

    def progress() -> LoadProgress | None:
        sys.stdout.write(f"{line}\n")
        return next(states)

    asyncio.run(show_loading(ModelConfig(), progress, Terminal()))

    assert [line] * 3 == capsys.readouterr().out.splitlines()


def test_a_pipe_gets_a_line_of_the_log_for_each_stage():
    pipe = StringIO()

    lines = show(ModelConfig(), pipe)

    assert "" == pipe.getvalue()
    assert [
        ("loading the model", "starting a process for it", None),
        ("loading the model", "reading its weights", 250_000_000),
        ("loading the model", "computing a first token", None),
    ] == lines


@pytest.mark.parametrize("engine", ["echo", "remote"])
def test_an_engine_that_loads_nothing_is_not_said_to_take_a_model_from_the_hub(engine: Literal["echo", "remote"]):
    lines = show(ModelConfig(name="org/name", engine=engine), StringIO())

    assert not any("hub" in str(line[0]) for line in lines)


def test_a_name_that_was_taken_for_a_model_of_the_hub_is_said():
    lines = show(ModelConfig(name="org/name"), StringIO())

    assert ("the model is taken from the Hugging Face hub", None, None) == lines[0]
