"""Tokenizers and models small enough to be made in a test, in the shapes that real ones have."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz.,!?0123456789"


def chatml_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<|im_start|>` and `<think>` are added tokens not marked special, as in several real models."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, the end of the world said hello"] * 4, trainer)
    backend.add_tokens([AddedToken("<|im_start|>"), AddedToken("<think>")])
    return _wrap(backend, template, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llama_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """BPE in SentencePiece's manner: a space before the first word, bytes for unknown characters, BOS in front."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    merges = [("▁", letter) for letter in LETTERS] + [("h", "e"), ("l", "o")]
    tokens += [left + right for left, right in merges]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return _wrap(backend, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Scored words over U+2581, as T5 has them: a word has its space in front, and the first one loses it."""
    scored = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((letter, -4.0) for letter in LETTERS)]
    scored += [(f"▁{word}", -1.0 - 1 / len(word)) for word in ("once", "upon", "a", "time", "there", "was")]
    backend = Tokenizer(models.Unigram(scored, unk_id=2, byte_fallback=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _wrap(backend, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """BERT's vocabulary: a word begins with a space that no token has, and what continues a word with ##."""
    words = ["once", "upon", "a", "time", "there", "was", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokens = ["[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(words)]
    backend = Tokenizer(models.WordPiece({token: at for at, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return _wrap(backend, template, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]")


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """A template that refuses a system message and two turns of one side."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["hello"], trainer)
    backend.add_special_tokens(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"])
    return _wrap(backend, GEMMA_2, bos_token="<bos>", eos_token="<eos>")


def save_tiny_llama(folder: Path, **changes: Any) -> Path:
    """Save a two-layer Llama with random weights and the ChatML tokenizer; `changes` go into its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    tokenizer = chatml_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def token_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """Return the id of one token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(name)
    assert isinstance(found, int)
    return found


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Save as the worker does."""
    tokenizer.save_pretrained(folder)
    return folder


def _wrap(backend: Tokenizer, template: str | None, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = template
    return tokenizer
