"""The files of adapters: what is refused, with the name of the file and the field."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.worker.loading.model_files import LoadError
from tests.unit.worker.families import FAMILIES, make
from tests.unit.worker.lora_adapters import ATTENTION, MLP, read, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OF_RANK_5 = {"A": torch.ones(5, 32), "B": torch.ones(32, 5)}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> Any:
    return make(FAMILIES["llama"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(make(FAMILIES["llama"]), tmp_path_factory.mktemp("adapter"), r=4, lora_alpha=8)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return shutil.copytree(saved, tmp_path / "adapter")


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path, model: Any) -> str:
    with pytest.raises(LoadError) as refused:
        read(folder, model)
    return str(refused.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"corda_config": {"x": 1}}, "corda_config"),
        ({"a_field_of_tomorrow": "on"}, "a_field_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil.code"}}, "auto_mapping"),
        ({"base_model_name_or_path": ["a", "b"]}, "base_model_name_or_path"),
        ({"r": 0}, "r must"),
        ({"r": "4"}, "r must"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "alpha_pattern"),
    ],
)  # fmt: skip
def test_what_an_adapter_needs_and_does_not_get_is_refused_by_name(
    folder: Path, model: Any, fields: dict[str, Any], named: str
) -> None:
    change_config(folder, **fields)

    assert refusal(folder, model).startswith(f"{CONFIG}: {named}")


def test_the_base_model_that_a_configuration_names_is_never_followed(folder: Path, model: Any) -> None:
    """It may name a repository, a path or an address: the adapter is applied to the loaded model, if it fits."""
    for base in ("someone/another-model", "/etc/passwd", "https://example.com/model", None):
        change_config(folder, base_model_name_or_path=base, revision="main")
        assert read(folder, model).rank == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 97)}), "lora_embed"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(97, 32)}), "lm_head.weight is not"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32).to(torch.int8)}), "stored as int8"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)}), "not finite"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 48)}), "belongs to another model"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(32, 5)}), "belongs to another model"),
        (lambda t: t.update({f"{Q}.lora_{half}.weight": ones for half, ones in OF_RANK_5.items()}), "rank 5"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "only one of"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)  # fmt: skip
def test_tensors_that_are_none_of_a_linear_layers_product_are_refused(
    folder: Path, model: Any, change: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    change_tensors(folder, change)

    assert words in refusal(folder, model)
    assert refusal(folder, model).startswith(f"{WEIGHTS}: ")


def test_an_adapter_of_another_model_is_refused(folder: Path) -> None:
    """By the names of layers, or by their sizes."""
    assert "no linear layer of this model" in refusal(folder, make(FAMILIES["gpt2"]))
    assert "belongs to another model" in refusal(folder, make(FAMILIES["qwen3"]).__class__(_wider()))


def _wider() -> Any:
    config = make(FAMILIES["qwen3"]).config
    config.hidden_size = 64
    return config


def test_the_output_projection_takes_no_adapter(folder: Path, model: Any) -> None:
    """It computes some tokens only, those whose logits are wanted."""
    halves = {"A": torch.ones(4, 32), "B": torch.ones(97, 4)}
    head = {f"base_model.model.lm_head.lora_{half}.weight": ones for half, ones in halves.items()}
    change_tensors(folder, lambda tensors: tensors.update(head))

    assert "lm_head is no linear layer of this model that can have an adapter" in refusal(folder, model)


def test_a_rank_above_the_limit_is_refused(folder: Path, model: Any) -> None:
    with pytest.raises(LoadError, match=r"rank 4; at most 3 is allowed \(adapters.max_rank\)"):
        read(folder, model, max_rank=3)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x10\0\0\0\0\0\0\0{broken         "])
def test_a_damaged_file_is_refused(folder: Path, model: Any, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)

    assert refusal(folder, model).startswith(f"{WEIGHTS}: is damaged")


def test_pickled_weights_are_never_read(folder: Path, model: Any) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")

    assert f"{WEIGHTS}: cannot be read (No such file or directory)" == refusal(folder, model)


def test_ranks_and_alphas_of_single_layers_are_those_of_peft(tmp_path: Path) -> None:
    build = FAMILIES["llama"]
    settings: dict[str, Any] = {
        "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"k_proj": 3, "layers.0.self_attn.q_proj": 5},
    }
    model = make(build)
    save_adapter(model, tmp_path, r=4, lora_alpha=8, target_modules=[*ATTENTION, *MLP], **settings)

    adapter = read(tmp_path, make(build))

    tuned = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert tuned.keys() == adapter.layers.keys()
    assert adapter.rank == 7
    for name, module in tuned.items():
        delta = module.get_delta_weight("default")
        down, up, scale = adapter.layers[name]
        assert torch.allclose(scale * up.T @ down, delta, atol=1e-6)


def test_the_digest_covers_weights_and_settings(folder: Path, model: Any) -> None:
    """It is the same for the same files, and another one once anything in them changes."""

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.lora_A.weight"].mul_(2)

    digests = [read(folder, model).digest, read(folder, model).digest]
    change_config(folder, lora_alpha=16)
    digests.append(read(folder, model).digest)
    change_tensors(folder, double)
    digests.append(read(folder, model).digest)

    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
