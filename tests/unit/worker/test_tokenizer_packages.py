"""A tokenizer that only another package can read is refused by the package's name."""

import json
from pathlib import Path

import pytest

from app.worker.loading import tokenizer_packages
from app.worker.loading.model_files import LoadError
from app.worker.loading.tokenizer_packages import missing_package
from tests.unit.tiny_models import save_tiny_llama
from tests.unit.worker.test_loader import load_folder

SENTENCEPIECE = b"\n\r\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
TIKTOKEN = b"IQ== 0\nIg== 1\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.model", SENTENCEPIECE, "tokenizer.model can only be read with sentencepiece and protobuf"),
        ("spiece.model", SENTENCEPIECE, "spiece.model can only be read with sentencepiece and protobuf"),
        ("tokenizer.model", TIKTOKEN, "tokenizer.model can only be read with tiktoken"),
        ("qwen.tiktoken", TIKTOKEN, "qwen.tiktoken can only be read with tiktoken"),
        ("tekken.json", b"{}", "tekken.json can only be read with mistral_common"),
    ],
)
def test_a_file_of_another_package_names_it(
    tmp_path: Path, name: str, content: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
):
    """And what to do; where the package is installed it is not at fault."""
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(tokenizer_packages, "_is_installed", lambda module: False)
    missing = missing_package(tmp_path, ValueError("Error parsing line"))
    monkeypatch.setattr(tokenizer_packages, "_is_installed", lambda module: True)

    assert f"{reason}, not installed here; install it or add tokenizer.json" == missing
    assert missing_package(tmp_path, ValueError("Error parsing line")) is None


def test_a_package_that_transformers_names_is_named():
    """Its own sentence has the name of the class first."""
    error = ImportError("\nT5Converter requires the protobuf library but it was not found in your environment.")

    assert "its tokenizer needs the package protobuf, which is not installed" == missing_package(Path(), error)


def test_a_model_whose_tokenizer_needs_a_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In place of the fault that transformers finds in the file when it reads it as another's."""
    folder = save_tiny_llama(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "tokenizer.model").write_bytes(SENTENCEPIECE)
    monkeypatch.setattr(tokenizer_packages, "_is_installed", lambda module: module == "tiktoken")

    with pytest.raises(LoadError, match=r"^tokenizer\.model can only be read with sentencepiece and protobuf"):
        load_folder(folder)
