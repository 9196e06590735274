"""Tiny models with random weights, one for each shape that real families have."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from app.worker.loaded_model import LoadedModel

VOCABULARY = 97
CONTEXT = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_WINDOW = {**_GROUPED, "head_dim": 8, "sliding_window": 8}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT, n_positions=CONTEXT)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_WINDOW)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=8)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_SIZES)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED, sliding_window=8)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=CONTEXT, word_embed_proj_dim=32, bos_token_id=None, eos_token_id=None,
        )
    ),
    "mistral with a window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=8)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "gpt neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES)),
}  # fmt: skip

NOT_BATCHABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)),
        "layers of the kind linear_attention",
    ),
    "bloom": (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
        "attention of its own",
    ),
    "gpt-j": (
        lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT, n_positions=CONTEXT, rotary_dim=4)),
        "attention of its own",
    ),
    "gpt-oss": (lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_WINDOW, num_local_experts=4)), "s_aux"),
    "rotation by the longest": (
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**_GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
        ),
        "rotary positions are of the kind dynamic",
    ),
}  # fmt: skip


def make(build: Callable[[], Any]) -> Any:
    """Build a model; one name gives the same weights each time."""
    torch.manual_seed(5)
    model = build().eval()
    # Random weights of the usual size give nearly equal logits; larger ones make every step's choice a clear one.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return model


def loaded(model: Any) -> LoadedModel:
    """A model as the loader hands it over; the batching runner needs no pipeline."""
    pipeline: Any = None
    return LoadedModel(
        pipeline=pipeline,
        revision=None,
        device="cpu",
        dtype="float32",
        context_length=CONTEXT,
        vocab_size=VOCABULARY,
        parameters=0,
        end_ids=(),
        pad_id=0,
    )
