"""Weights that do not fit into the free memory are refused before any of it is taken."""

import json
import struct
from pathlib import Path

import pytest
import torch

from app.worker.loading import memory_check
from app.worker.loading.load_failure import load_failure
from app.worker.loading.memory_check import check_memory, weights_bytes
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

    assert ("no_memory", 4 * 10**9, 10**9) == (sent.reason, sent.needed_bytes, sent.free_bytes)
    assert "it needs 4.00 GB of memory for its weights, and 1.00 GB are free" in sent.message


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
