"""How the other servers are started and asked."""

from pathlib import Path

import pytest

from bench.peers import OpenVino, Setup, Vllm
from bench.process import ROOT


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """A machine on which an interpreter stands where OpenVINO GenAI's would."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    return Setup(tmp_path / "model", "bfloat16", 2, tmp_path, "words", openvino=tmp_path)


def test_openvino_gets_the_same_model_type_and_threads_as_all(setup: Setup, tmp_path: Path):
    command = OpenVino().command(setup, 8000)

    assert [str(tmp_path / "bin" / "python"), "-m", "bench.openvino_server", str(setup.model)] == command[:4]
    assert ["--dtype", "bfloat16", "--threads", "2", "--port", "8000"] == command[4:]


def test_an_environment_of_its_own_finds_none_of_our_libraries(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    """Only the benchmark's own folder, which holds its program."""
    monkeypatch.setenv("PYTHONPATH", "/our/libraries")

    assert "PYTHONPATH" not in Vllm().environment(setup)
    assert str(ROOT) == OpenVino().environment(setup)["PYTHONPATH"]


def test_a_server_that_is_not_installed_is_left_out_with_the_reason(setup: Setup, tmp_path: Path):
    without = Setup(setup.model, "bfloat16", 2, tmp_path, "words")
    elsewhere = Setup(setup.model, "bfloat16", 2, tmp_path, "words", openvino=tmp_path / "absent")

    assert OpenVino().missing(setup) is None
    assert "no installation given (--openvino)" == OpenVino().missing(without)
    assert "there is no " in (OpenVino().missing(elsewhere) or "")
