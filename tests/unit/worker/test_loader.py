"""Which models are loaded and how, and what is said of those that are not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import GPT2Config, GPT2LMHeadModel

from app.ipc.messages import ModelSpec
from app.worker.loaded_model import LoadedModel
from app.worker.loading import loader
from app.worker.loading.load_failure import load_failure
from app.worker.loading.loader import load
from app.worker.loading.model_files import LoadError
from tests.unit.tiny_models import chatml_tokenizer, save_tiny_llama

SPEC = ModelSpec(name="", source="local", device="cpu", dtype="auto", revision=None, max_model_len=None, threads=0)


def load_folder(folder: Path, **changes: Any) -> LoadedModel:
    spec = msgspec.structs.replace(SPEC, name=str(folder), **changes)
    return load(spec, str(folder / "saved"), on_stage=lambda stage: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"), eos_token_id=[4, 5])


def test_a_model_is_loaded_as_it_is(llama: Path):
    """Facts come from the model itself; on a CPU the weights are float32, and every end token counts."""
    loaded = load_folder(llama)

    assert ("cpu", "float32", 2048, 281) == (loaded.device, loaded.dtype, loaded.context_length, loaded.vocab_size)
    assert (1, 4, 5) == loaded.end_ids
    assert () == loaded.recommended
    assert loaded.parameters == sum(weight.numel() for weight in loaded.pipeline.model.parameters())
    assert not loaded.pipeline.model.training


def test_what_the_models_makers_recommend_is_known_and_not_applied(tmp_path: Path):
    """Sampling settings of generation_config.json; the model itself has none left that would fill gaps in a request."""
    folder = save_tiny_llama(tmp_path)
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "max_length": 99}
    (folder / "generation_config.json").write_text(json.dumps(config))

    loaded = load_folder(folder)

    assert {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05} == dict(loaded.recommended)
    assert loaded.pipeline.model.generation_config.top_k is None


def test_the_dtype_can_be_chosen(llama: Path):
    """What the configuration names wins over the device's default."""
    assert "bfloat16" == load_folder(llama, dtype="bfloat16").dtype


@pytest.mark.parametrize(
    ("own", "computed", "changes", "expected"),
    [
        ("bfloat16", True, {}, "bfloat16"),
        ("bfloat16", False, {}, "float32"),
        ("float32", True, {}, "float32"),
        ("bfloat16", True, {"quantization": "int8"}, "float32"),
        ("bfloat16", True, {"quantization": "int8", "compile": "none"}, "bfloat16"),
    ],
)
@pytest.mark.usefixtures("compiler")
def test_left_to_itself_the_dtype_is_the_fastest(
    own: str, computed: bool, changes: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bfloat16 for a model that has it on a processor that computes it, except for int8, whose native kernels compute
    in float32."""
    folder = save_tiny_llama(tmp_path)
    change_config(dtype=own)(folder)
    monkeypatch.setattr(loader, "cpu_has_bfloat16", lambda: computed)

    assert expected == load_folder(folder, **changes).dtype


@pytest.mark.parametrize(("limit", "expected"), [(None, 64), (16, 16), (1000, 64)])
def test_the_context_window_is_the_models_or_less(tmp_path: Path, limit: int | None, expected: int):
    """Also of a model that calls it by another name; a larger limit changes nothing."""
    config = GPT2Config(n_positions=64, n_embd=8, n_layer=1, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    chatml_tokenizer().save_pretrained(tmp_path)

    assert expected == load_folder(tmp_path, max_model_len=limit).context_length


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_weights, "safetensors"),
        (without_config, "no config.json"),
        (with_adapter, "an adapter"),
        (change_config(model_type="t5", architectures=["T5ForConditionalGeneration"]), "not a decoder-only"),
        (change_config(model_type="bert", architectures=["BertForMaskedLM"]), "not a decoder-only"),
        (change_config(model_type="none_such", auto_map={"AutoConfig": "trap.Config"}), "code of its own"),
    ],
    ids=["pickled weights", "no config", "adapter", "encoder-decoder", "encoder", "remote code"],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, damage: Callable[[Path], None], reason: str):
    """The refusal says why in one line, and no code of the model has run."""
    folder = save_tiny_llama(tmp_path / "model")
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Config: pass\n")
    damage(folder)

    with pytest.raises(LoadError, match=reason):
        load_folder(folder)

    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    """The operator sees the whole path that was looked for."""
    with pytest.raises(LoadError, match=str(tmp_path / "none")):
        load_folder(tmp_path / "none")


@pytest.mark.parametrize("name", ["../secrets", "a/b/c", "http://host/x", "/etc", "a/..", "a b", ""])
def test_a_name_that_is_no_hub_id_is_refused(name: str):
    """Nothing is looked for under it, neither on the hub nor on the disk."""
    with pytest.raises(LoadError, match="hub id"):
        load(msgspec.structs.replace(SPEC, name=name, source="hub"), "unused", on_stage=lambda stage: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_missing_device_is_refused(llama: Path):
    """An explicit device is never silently another one."""
    with pytest.raises(LoadError, match="no usable device cuda"):
        load_folder(llama, device="cuda")


RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid/x"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LoadError("it is odd"), "it is odd"),
        (GatedRepoError("x", response=RESPONSE), "accept its terms"),
        (RepositoryNotFoundError("x", response=RESPONSE), "no such model"),
        (RevisionNotFoundError("x", response=RESPONSE), "no such revision"),
        (LocalEntryNotFoundError("x"), "cannot be reached"),
        (HfHubHTTPError("it broke", response=RESPONSE), "it broke"),
        (MemoryError(), "does not fit into memory"),
        (torch.OutOfMemoryError(), "does not fit into memory"),
        (ValueError("first\nsecond"), "ValueError: first second."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failed_load_is_told_in_one_line(error: Exception, words: str):
    """Each kind of failure names what the operator can do."""
    reason = load_failure(error).message

    assert words in reason
    assert "\n" not in reason
