"""A model's own logits in the serial runner: those of a prompt, and those from which `generate` chooses.

`generate` shows its callers only what its settings have made of them, so they are read where the model returns them.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from app.types import TokenLogprob
from app.worker.sampling.prompt_scoring import max_scored_tokens, score_tokens
from app.worker.sampling.sampler import SamplingFailure


def score_prompt(
    model: Any, prompt: Sequence[int], alternatives: int, device: str
) -> Iterator[list[TokenLogprob] | SamplingFailure]:
    """Yield the log-probabilities of a prompt's tokens, from the second on, as many at once as fit into memory.

    The whole prompt is computed for each part: a model that is served one request at a time may have a state of any
    kind, which only it knows how to continue.
    """
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=model.device)
    following = prompt[1:]
    chosen = "logits_to_keep" in inspect.signature(model.forward).parameters
    rows = max_scored_tokens(model.get_output_embeddings().weight.shape[0], device) if chosen else len(following)
    for start in range(0, len(following), max(1, rows)):
        positions = torch.arange(start, min(start + rows, len(following)), device=model.device)
        part = {"logits_to_keep": positions} if chosen else {}
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **part).logits[0]
        yield score_tokens(logits[: len(positions)], following[start : start + rows], alternatives)


class LastLogits:
    """The logits after the last token of the model's newest forward pass."""

    def __init__(self) -> None:
        self._logits: Tensor | None = None

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Read them while the context lasts."""
        hook = model.register_forward_hook(self._keep)
        try:
            yield
        finally:
            hook.remove()

    def score(self, token: int, alternatives: int) -> list[TokenLogprob] | SamplingFailure:
        """Return the log-probability of the token that was chosen after them."""
        assert self._logits is not None  # noqa: S101  # a token is chosen after a forward pass
        return score_tokens(self._logits, [token], alternatives)

    def _keep(self, model: Any, inputs: Any, output: Any) -> None:
        self._logits = output.logits[:1, -1]
