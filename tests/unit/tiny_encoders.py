"""Encoders small enough to be made in a test, in the layout of sentence-transformers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SIZE = 32
"""Numbers of a token's hidden state."""
MAX_TOKENS = 48
"""Of the longest text."""
POSITIONS = 64
WORDS = "the cat sat on a mat while the dog ran to the old red house by the sea and query: passage: Paris London"
PROMPTS = {"query": "query: ", "document": "passage: "}
POOLING: Mapping[str, Any] = {"word_embedding_dimension": SIZE, "pooling_mode_mean_tokens": True}
_TYPE = "sentence_transformers.models."


def wordpiece_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """BERT's: lowercased words and parts of words between [CLS] and [SEP]."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=settings.pop("lowercase", True))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=names, show_progress=False)
    backend.train_from_iterator([WORDS, WORDS.lower(), "abcdefghijklmnopqrstuvwxyz 0123456789 .,!?@"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named, **settings)


def save_tiny_bert(folder: Path, *, tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any) -> Path:
    """Save a BERT of two layers with random weights, as a plain model; `changes` go into its configuration."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(11)
    tokenizer = tokenizer or wordpiece_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
    }
    BertModel(BertConfig(**(settings | changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_encoder(
    folder: Path,
    *,
    pooling: Mapping[str, Any] = POOLING,
    dense: Mapping[str, Any] | None = None,
    normalize: bool = True,
    prompts: Mapping[str, str] = PROMPTS,
    default_prompt: str | None = None,
    lowercase: bool = False,
    max_tokens: int | None = MAX_TOKENS,
    **model: Any,
) -> Path:
    """Save the same with modules around it.

    Args:
        dense: configuration of a projection; its weights are random.
        model: of `save_tiny_bert`.
    """
    save_tiny_bert(folder, **model)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    write(folder / "1_Pooling/config.json", pooling)
    if dense is not None:
        modules.append(("2_Dense", "Dense"))
        _save_dense(folder / "2_Dense", dense)
    if normalize:
        modules.append(("3_Normalize", "Normalize"))
        (folder / "3_Normalize").mkdir()
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": _TYPE + kind}
        for number, (path, kind) in enumerate(modules)
    ]
    write(folder / "modules.json", listed)
    limits = {} if max_tokens is None else {"max_seq_length": max_tokens}
    write(folder / "sentence_bert_config.json", {**limits, "do_lower_case": lowercase})
    write(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": default_prompt})
    return folder


def write(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _save_dense(folder: Path, config: Mapping[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    write(folder / "config.json", config)
    generator = torch.Generator().manual_seed(5)
    outputs, inputs = config["out_features"], config["in_features"]
    weights = {"linear.weight": torch.randn(outputs, inputs, generator=generator)}
    if config["bias"]:
        weights["linear.bias"] = torch.randn(outputs, generator=generator)
    save_file(weights, folder / "model.safetensors")
