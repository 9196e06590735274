"""The tables and the page that a result becomes."""

import json
from pathlib import Path

import pytest

from bench.engine import Compared
from bench.figures import Figures, Measured
from bench.peers import Setup
from bench.report import page, result, tables


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, object]:
    """A result of two loads on three servers, of which one failed at one load and one was never there."""
    shape = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (tmp_path / "model.safetensors").write_bytes(bytes(2_000_000))
    loads = [
        Measured("c1", "ours", [Figures(30.0, 100, 200, 30, 40, 0.01)]),
        Measured("c1", "serve", [Figures(20.0, 150, 300, 40, 50, 0.02)]),
        Measured(
            "chat", "ours", [Figures(30.0, 100, 200, 30, 40, 0.01)], [(80, 100, 96), (100, 1, 130)], (90, 180, 270)
        ),
        Measured("chat", "serve", [], failure="HTTP 500: a | b\nsecond line"),
    ]
    compared = [Compared(8, "batching", [95.0, 50.0, 96.0], [100.0, 50.0, 100.0])]
    memory = {"ours": [100_000_000, 700_000_000], "serve": [900_000_000]}
    setup = Setup(tmp_path, "float32", 2, tmp_path, "words")
    return result(loads, compared, memory, {"vllm": "no installation given (--vllm)"}, setup, 3)


def test_each_peer_stands_beside_the_ratio_to_it(measured):
    """Above 1 this service made more tokens per second."""
    assert "| 1 client | this service | 30.0 |  | 100, 200 | 30, 40 |\n" in tables(measured)
    assert "| 1 client | transformers serve | 20.0 | 1.50 | 150, 300 | 40, 50 |\n" in tables(measured)


def test_what_could_not_be_measured_is_said_in_the_table(measured):
    """A missing server and a failed load have a row with the reason, in one line and without the table's own bar."""
    assert "| all | vLLM | not measured: no installation given (--vllm) |  |  |  |\n" in tables(measured)
    assert "| transformers serve | not measured: HTTP 500: a / b |  |  |  |\n" in tables(measured)


def test_the_last_turn_of_a_conversation_is_held_against_the_first(measured):
    """Medians over the rounds: 90 and 113 ms."""
    assert "| this service | 90 (90 tokens) | 113 (270 tokens) | 1.26 |\n" in tables(measured)


def test_the_engine_is_held_against_the_loop_of_the_same_round(measured):
    """The slow round was slow for both, so it says as much as the others."""
    assert "| 8 (batching) | 95.0 | 100.0 | 0.96 |\n" in tables(measured)


def test_openvino_stands_beside_the_engine_where_it_was_there(measured):
    """With its own ratio, of the same rounds."""
    assert "OpenVINO" not in tables(measured)
    measured["engine"] = [
        Compared(8, "batching", [90.0, 50.0, 96.0], [100.0, 50.0, 100.0], [60.0, 40.0, 64.0]).as_json()
    ]

    assert "| engine ÷ loop | OpenVINO GenAI, tokens/s | engine ÷ it |\n" in tables(measured)
    assert "| 8 (batching) | 90.0 | 100.0 | 0.96 | 60.0 | 1.50 |\n" in tables(measured)


def test_the_table_says_what_the_processor_can(measured):
    """Also that of data which an older version wrote, as far as that says it."""
    measured["machine"] |= {"cpu": "A processor", "cores": 2, "features": ["avx2", "amx_bf16"]}
    assert tables(measured).startswith("2 cores of A processor (avx2 amx_bf16), 2 threads, float32\n")

    del measured["machine"]["features"]
    assert "A processor (features unknown)" in tables(measured)


def test_the_workers_memory_is_held_against_what_it_may_take(measured):
    """A million weights and 32 rows of 2,048 tokens, in float32, a gibibyte of prefixes and 600 MB for all else."""
    allowed = "the 67 MB of 32 full slots, 1074 MB of prefixes and 600 MB allowed"
    assert "holds 700 MB: 4 MB of weights and 696 MB" in tables(measured)
    assert f"within {allowed}" in tables(measured)

    measured["memory"]["ours"] = [1_800_000_000]
    assert f"ABOVE {allowed}" in tables(measured)


def test_the_page_can_be_made_from_the_stored_data(measured):
    """`python -m bench.report` reads what `bench.serve` wrote."""
    again = page(json.loads(json.dumps(measured)))

    assert page(measured) == again
    assert "medians of 3 rounds" in again
    assert "](serve.png)" in again
