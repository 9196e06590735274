"""Generate the model that the benchmark serves: a Llama with random weights and a tokenizer of made-up words, offline.

    python -m bench.model FOLDER [--shape 135m|tiny]

Prints the type that this machine computes in fastest, float32 or bfloat16.  An existing folder is left as it is.
Runs as a process of its own, so that the one that measures never loads torch.
"""

import argparse
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from bench.words import CONTROL, FIRST_WORD, SYLLABLES, VOCABULARY, WORDS

CONTEXT_TOKENS = 2048
SPACE = "Ġ"
"""How a byte-level vocabulary writes it."""
QUIET = 0.1
"""Factor on the embeddings of all tokens that are no words: weights are tied, so completions consist of words only."""
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Capabilities of a CPU that computes in bfloat16; without one torch emulates it, far slower than float32."""
CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""


@dataclass(frozen=True)
class Shape:
    """The size of a model, in the words of its configuration."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64


SHAPES = {"135m": Shape(576, 1536, 30, 9, 3), "tiny": Shape(128, 256, 2, 2, 1)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer in which each word of `bench.words` is one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(syllable[0], syllable[1]) for syllable in SYLLABLES]
    merges += [(SPACE, syllable) for syllable in SYLLABLES]
    merges += [(f"{SPACE}{word[:-2]}", word[-2:]) for word in WORDS]
    tokens = [*CONTROL, *letters, *(left + right for left, right in merges)]
    backend = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    start, end, pad = CONTROL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token=pad,
        additional_special_tokens=[start],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(shape: Shape) -> Any:
    """Build the model in bfloat16; the weights are the same every time."""
    end, pad = CONTROL.index("<|im_end|>"), CONTROL.index("<|pad|>")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        **asdict(shape),
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[:FIRST_WORD] *= QUIET
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return model.to(torch.bfloat16)


def make(folder: Path, shape: Shape) -> None:
    """Write model and tokenizer to a folder, all of it or nothing."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_model(shape).save_pretrained(unfinished)
    make_tokenizer().save_pretrained(unfinished)
    unfinished.rename(folder)


def best_dtype() -> str:
    """Return the type that a CPU (or, if there is one, a GPU) computes in fastest."""
    can = torch.cpu.get_capabilities()
    return "bfloat16" if torch.cuda.is_available() or any(can.get(name) for name in BFLOAT16) else "float32"


def main() -> None:
    """Generate the model unless the folder exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if not arguments.folder.exists():
        make(arguments.folder, SHAPES[arguments.shape])
    print(best_dtype())


if __name__ == "__main__":
    main()
