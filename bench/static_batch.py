"""The yardstick of the engine: a hand-written loop over one batch of equal prompts, and nothing else.

    python -m bench.static_batch FOLDER DTYPE THREADS

Prefill in one pass, then one pass for each token, greedily, on preallocated keys and values.  For each line on standard
input, `{"batch": 8, "prompt": 105, "new": 64, "seed": 1}`, it prints the seconds that took.
"""

import argparse
import json
import random
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging

from bench.words import token_ids


class Preallocated(DynamicLayer):
    """Keys and values of one layer, written in place: nothing is copied when a token is added."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length, self._used = length, 0
        self._storage: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (batch, heads, tokens, size) and return all until now."""
        if not self._storage:
            batch, heads, _, size = key_states.shape
            self._storage = tuple(key_states.new_empty(batch, heads, self._length, size) for _ in range(2))
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        start, self._used = self._used, self._used + key_states.shape[2]
        for storage, states in zip(self._storage, (key_states, value_states), strict=True):
            storage[:, :, start : self._used] = states
        self.keys, self.values = (storage[:, :, : self._used] for storage in self._storage)
        return self.keys, self.values


@torch.inference_mode()
def generate(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """Continue (batch, prompt) token ids greedily; return (batch, new_tokens)."""
    length = prompts.shape[1] + new_tokens
    cache = Cache(layers=[Preallocated(length) for _ in range(model.config.num_hidden_layers)])
    generated, ids = [], prompts
    for _ in range(new_tokens):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        generated.append(ids)
    # Where the tokens are read one by one, as any server must, this waits for a GPU.
    return torch.cat(generated, dim=1).cpu()


def main() -> None:
    """Load the model, print "ready", and run one batch for each line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("dtype")
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype))
    model.to(device).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        draw = random.Random(job["seed"])
        prompts = torch.tensor([token_ids(draw, job["prompt"]) for _ in range(job["batch"])], device=device)
        began = time.perf_counter()
        generate(model, prompts, job["new"])
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
