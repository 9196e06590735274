"""Small model folders whose files say what is not so: each is a tiny Llama with one thing wrong."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tests.unit.tiny_models import chatml_tokenizer, save_tiny_llama, token_id

Damage = Callable[[Path], None]
"""Changes one thing in the folder of a sound model."""
Weights = dict[str, Tensor]


def lying_llama(folder: Path, damage: Damage, **config: Any) -> Path:
    """Save a sound tiny Llama and damage it."""
    save_tiny_llama(folder, **config)
    damage(folder)
    return folder


def change_json(name: str, changes: Mapping[str, Any], *removed: str) -> Damage:
    """Return a damage that sets keys of a JSON file, which is made where there is none, and removes others."""

    def damage(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        changed = {key: value for key, value in (content | dict(changes)).items() if key not in removed}
        path.write_text(json.dumps(changed))

    return damage


def write(name: str, text: str) -> Damage:
    """Return a damage that replaces a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def change_weights(change: Callable[[Weights], Weights]) -> Damage:
    """Return a damage that saves other weights in place of the model's own."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        changed = {name: tensor.clone() for name, tensor in change(load_file(path)).items()}
        save_file(changed, path, metadata={"format": "pt"})

    return damage


def drop_weights(*parts: str) -> Damage:
    """Return a damage that leaves out every tensor whose name contains one of `parts`."""
    return change_weights(lambda weights: {k: v for k, v in weights.items() if not any(part in k for part in parts)})


def rename_weights(old: str, new: str) -> Damage:
    """Return a damage that replaces a part of every tensor's name; an empty `old` puts `new` in front."""
    return change_weights(lambda weights: {k.replace(old, new) if old else new + k: v for k, v in weights.items()})


def fill_weights(part: str, value: float) -> Damage:
    """Return a damage that sets the first number of every tensor whose name contains `part`."""

    def change(weights: Weights) -> Weights:
        for name, tensor in weights.items():
            if part in name:
                tensor.view(-1)[0] = value
        return weights

    return change_weights(change)


def add_weights(**extra: Tensor) -> Damage:
    """Return a damage that adds tensors; two underscores in a name stand for a dot."""
    return change_weights(lambda weights: weights | {k.replace("__", "."): v for k, v in extra.items()})


def eight_bits_without_scales(weights: Weights) -> Weights:
    """Store linear layers in 8 bits, under the name of a format whose scales no loader of transformers knows."""
    small: Weights = {}
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            scale = weight.abs().max() / 448
            small |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.reshape(1)}
        else:
            small[name] = weight
    return small


def save_overflowing_gpt2(folder: Path, token: str) -> Path:
    """Save a one-layer GPT-2 that loads, and whose scores are not finite once a prompt holds `token`."""
    tokenizer = chatml_tokenizer()
    settings: dict[str, Any] = {"n_positions": 512, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.4}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    torch.manual_seed(1)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **settings, **ends))
    with torch.no_grad():
        # Finite by itself; the sum over a row, which a layer norm takes, is not.
        model.transformer.wte.weight[token_id(tokenizer, token)] = 3e38
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def all_of(*damages: Damage) -> Damage:
    """Return a damage that does several."""

    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage
