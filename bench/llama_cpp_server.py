"""llama.cpp by its Python package, behind OpenAI's two routes: a peer of `bench.serve`.

    python -m bench.llama_cpp_server MODEL --dtype bfloat16 --threads 2 --port 8000

Runs in an environment of its own (`python -m tests.upstreams.environments llama-cpp`), for whose processor it was
compiled.  The model is converted once, beside its folder and with its weights as they are.  As in the package's own
server one request is computed at a time, the beginning of a prompt that the last one had is not computed again, and the
others wait.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from llama_cpp import Llama

from bench.token_server import serve

TYPES = {"float32": GGMLQuantizationType.F32, "bfloat16": GGMLQuantizationType.BF16}
"""Of the weights and of the KV cache."""
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""What GGUF calls the parts of a layer."""


def converted(model: Path, dtype: str) -> Path:
    """Return a Llama of `bench.model` as a GGUF file, after converting it if need be."""
    file = model.with_name(f"{model.name}-{dtype}.gguf")
    if not file.exists():
        unfinished = file.with_suffix(".unfinished")
        writer = GGUFWriter(unfinished, "llama")
        config = json.loads((model / "config.json").read_text())
        _describe(writer, config)
        _add_tokenizer(writer, json.loads((model / "tokenizer.json").read_text()))
        for name, weights in _weights(model / "model.safetensors"):
            _add(writer, name, weights, config, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.rename(file)
    return file


def _describe(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_eos_token_id(config["eos_token_id"])


def _add_tokenizer(writer: GGUFWriter, tokenizer: dict[str, Any]) -> None:
    special = {each["content"] for each in tokenizer["added_tokens"]}
    tokens = list(tokenizer["model"]["vocab"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])


def _weights(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the bits of each weight, which are bfloat16: NumPy has no such type."""
    content = np.memmap(file, mode="r")
    size = int(content[:8].view(np.uint64)[0])
    for name, each in json.loads(bytes(content[8 : 8 + size])).items():
        if name != "__metadata__":
            begin, end = each["data_offsets"]
            yield name, content[8 + size + begin : 8 + size + end].view(np.uint16).reshape(each["shape"])


def _add(writer: GGUFWriter, name: str, weights: np.ndarray, config: dict[str, Any], dtype: str) -> None:
    """Add a weight under its GGUF name; norms are always float32."""
    if ".q_proj" in name or ".k_proj" in name:
        heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
        # Rotary embeddings turn neighbouring elements there, and here elements half a head apart.
        weights = weights.reshape(heads, 2, -1, weights.shape[-1]).swapaxes(1, 2).reshape(weights.shape)
    kind = TYPES[dtype] if weights.ndim > 1 else GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.F32:
        weights = (weights.astype(np.uint32) << 16).view(np.float32)
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(weights))
    else:
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(weights).view(np.uint8), raw_dtype=kind)


def _gguf_name(name: str) -> str:
    parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES[parts[2]]}.weight"
    return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[0]]


class LlamaCpp:
    """Computes one request after the other."""

    def __init__(self, file: Path, dtype: str, threads: int) -> None:
        kind = int(TYPES[dtype])
        options = {"n_threads": threads, "n_threads_batch": threads, "type_k": kind, "type_v": kind}
        # No context of its own: the model's.
        self._llama = Llama(str(file), n_ctx=0, logits_all=False, verbose=False, **options)
        self._turn = asyncio.Lock()

    async def tokens(self, ids: Sequence[int], max_tokens: int) -> AsyncIterator[list[int]]:
        """Yield the tokens that follow these, one by one."""
        async with self._turn:
            generator = self._llama.generate(list(ids), temp=0.0, repeat_penalty=1.0)
            for _ in range(max_tokens):
                yield [await asyncio.to_thread(next, generator)]


def main() -> None:
    """Convert and load the model, and serve it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=TYPES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    serve(LlamaCpp(converted(given.model, given.dtype), given.dtype, given.threads), given.model, given.port)


if __name__ == "__main__":
    main()
