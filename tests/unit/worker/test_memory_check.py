"""Weights that do not fit into the free memory are refused before any of it is taken."""

import json
import struct
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MambaConfig

from app.worker.loading import memory_check
from app.worker.loading.load_failure import load_failure
from app.worker.loading.memory_check import check_memory, kv_bytes_per_token, weights_bytes
from app.worker.loading.model_files import LoadError, NoMemoryError, NoModelError, UnsupportedError
from tests.unit.tiny_models import save_tiny_llama


def save_weights(folder: Path, dtype: str, count: int, bytes_each: int) -> Path:
    """Save one tensor of so many numbers; the file has a hole instead of them."""
    size = count * bytes_each
    header = json.dumps({"x.weight": {"dtype": dtype, "shape": [count], "data_offsets": [0, size]}}).encode()
    folder.mkdir(exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return folder


def test_a_model_that_does_not_fit_says_what_it_needs_and_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 10**9)
    with pytest.raises(NoMemoryError) as failure:
        check_memory(save_weights(tmp_path, "F32", 10**9, 4), "auto", "cpu")
    sent = load_failure(failure.value)

    assert ("no_memory", 4.2 * 10**9, 10**9) == (sent.reason, sent.needed_bytes, sent.free_bytes)
    assert "it needs 4.20 GB of memory (4.00 for its weights, the rest to compute a request)" in sent.message
    assert "and 1.00 GB are free" in sent.message


def test_what_a_request_needs_beside_the_weights_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One slot of the KV cache, which may have 0.4 of what the weights leave on a processor, and a margin."""
    folder = save_weights(tmp_path, "F32", 1000, 4)
    config = LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
    assert 2 * 4 * 2 * 8 * 4 == kv_bytes_per_token(config, torch.float32)
    assert 2 * 4 * 2 * 8 * 2 == kv_bytes_per_token(config, torch.bfloat16)
    assert 0 == kv_bytes_per_token(None, torch.float32)
    assert 0 == kv_bytes_per_token(MambaConfig(), torch.float32)

    def needed(context_length: int) -> int:
        with pytest.raises(NoMemoryError) as failure:
            check_memory(folder, "auto", "cpu", config=config, context_length=context_length)
        return failure.value.needed_bytes

    config.dtype = torch.float32
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 4000)
    assert 4200 + int(512 * 100 / 0.4) == needed(100)
    assert 4200 + int(512 * 2048 / 0.4) == needed(10**6)


def test_a_model_that_fits_passes(tmp_path: Path):
    check_memory(save_tiny_llama(tmp_path), torch.float32, "cpu")


@pytest.mark.parametrize(
    ("stored", "bytes_each", "dtype", "expected"),
    [
        ("F32", 4, "auto", 400),
        ("F32", 4, torch.bfloat16, 200),
        ("BF16", 2, torch.float32, 400),
        ("BF16", 2, "auto", 200),
        ("I32", 4, torch.float32, 400),
        ("U8", 1, torch.float32, 100),
        ("I8", 1, "auto", 100),
    ],
)
def test_weights_are_counted_as_they_will_be_in_memory(
    tmp_path: Path, stored: str, bytes_each: int, dtype: torch.dtype | str, expected: int
):
    """Floats are converted to the type of the computation; packed numbers stay as they are."""
    assert expected == weights_bytes(save_weights(tmp_path, stored, 100, bytes_each), dtype)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LoadError("config.json: is not valid JSON"), "bad_file"),
        (UnsupportedError("it is a picture model"), "unsupported"),
        (NoModelError("there is no folder x"), "not_found"),
        (MemoryError(), "no_memory"),
        (ValueError("something else"), "failed"),
    ],
)
def test_every_failure_has_its_reason_in_a_word(error: Exception, reason: str):
    assert reason == load_failure(error).reason


def test_a_long_message_of_a_library_ends_with_a_sentence():
    """What to do about it otherwise breaks off in the middle of a command."""
    said = "The type `mine` is not known. Look\nat the checkpoint. " + "To update run `pip install " + "x" * 300

    assert (
        "RuntimeError: The type `mine` is not known. Look at the checkpoint."
        in load_failure(RuntimeError(said)).message
    )
    assert load_failure(RuntimeError("x" * 400)).message.endswith("x" * 300 + ".")


@pytest.mark.parametrize(
    ("free", "wanted", "fitting"), [(10**6, 1, 1), (10**6, 3, 3), (4200, 2, 1), (8199, 2, 1), (8200, 2, 2)]
)
def test_further_forms_of_the_weights_need_their_memory_too(
    free: int, wanted: int, fitting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As many as fit beside the first and what a request needs."""
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: free)

    assert fitting == check_memory(save_weights(tmp_path, "F32", 1000, 4), "auto", "cpu", copies=wanted)
