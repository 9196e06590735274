"""How the other servers are started and asked."""

from pathlib import Path

import pytest

from bench.peers import LlamaCpp, OpenVino, Peer, Setup, Vllm
from bench.process import ROOT


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """A machine on which an interpreter stands where those of other servers would."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    return Setup(tmp_path / "model", "bfloat16", 2, tmp_path, "words", openvino=tmp_path, llama_cpp=tmp_path)


@pytest.mark.parametrize(
    ("peer", "module"), [(OpenVino(), "bench.openvino_server"), (LlamaCpp(), "bench.llama_cpp_server")]
)
def test_a_peer_without_a_server_gets_the_same_model_type_and_threads_as_all(
    peer: Peer, module: str, setup: Setup, tmp_path: Path
):
    command = peer.command(setup, 8000)

    assert [str(tmp_path / "bin" / "python"), "-m", module, str(setup.model)] == command[:4]
    assert ["--dtype", "bfloat16", "--threads", "2", "--port", "8000"] == command[4:]


def test_an_environment_of_its_own_finds_none_of_our_libraries(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    """Only the benchmark's own folder, which holds its program."""
    monkeypatch.setenv("PYTHONPATH", "/our/libraries")

    assert "PYTHONPATH" not in Vllm().environment(setup)
    assert str(ROOT) == OpenVino().environment(setup)["PYTHONPATH"] == LlamaCpp().environment(setup)["PYTHONPATH"]


def test_a_server_that_is_not_installed_is_left_out_with_the_reason(setup: Setup, tmp_path: Path):
    without = Setup(setup.model, "bfloat16", 2, tmp_path, "words")
    elsewhere = Setup(
        setup.model, "bfloat16", 2, tmp_path, "words", openvino=tmp_path / "absent", llama_cpp=tmp_path / "absent"
    )

    for peer in (OpenVino(), LlamaCpp()):
        assert peer.missing(setup) is None
        assert f"no installation given (--{peer.name})" == peer.missing(without)
        assert "there is no " in (peer.missing(elsewhere) or "")
