"""Log-probabilities of a prompt's own tokens, from the logits of its prefill.

Decides how much memory a step takes for them.  The runner asks for the logits after each token of a chunk; here each
row becomes the log-probability of the token that follows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from app.types import TokenLogprob
from app.worker.sampling.sampler import NO_TOKEN, SamplingFailure, logprob_report, token_logprob
from app.worker.sampling.sampling_ops import to_device

HOST_BYTES, DEVICE_BYTES = 64 * 1024 * 1024, 256 * 1024 * 1024
"""Most memory for the logits of one step's prompt tokens, in float32, on the host and on an accelerator."""
MIN_ROWS = 16
"""Rows that a step may have in any case, however large the vocabulary."""
BLOCK_BYTES = 8 * 1024 * 1024
"""Logits that become log-probabilities at once; what that needs beside them is a few times as much."""


def max_scored_tokens(vocab_size: int, device: str) -> int:
    """Return how many prompt tokens one step may compute logits for."""
    most = HOST_BYTES if device == "cpu" else DEVICE_BYTES
    return max(MIN_ROWS, most // (4 * vocab_size))


@torch.inference_mode()
def score_tokens(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenLogprob] | SamplingFailure:
    """Return how likely each token was, given the logits of its position.

    Args:
        logits: (tokens, vocab), any float type and device; not modified.
        tokens: within the vocabulary.
        alternatives: how many of the most likely tokens are listed for each; 0 to 20.
    """
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    scored: list[TokenLogprob] = []
    for start in range(0, len(tokens), rows):
        own = to_device(tokens[start : start + rows], torch.long, logits.device)
        found = _score_block(logits[start : start + rows], own, alternatives)
        if found is None:
            return NO_TOKEN
        scored += found
    return scored


def _score_block(logits: Tensor, tokens: Tensor, alternatives: int) -> list[TokenLogprob] | None:
    """Return None where the scores of a row are not finite."""
    if logits.device.type == "mps":  # it has no float64
        logits, tokens = logits.cpu(), tokens.cpu()
    scores = logits.float()
    report = logprob_report(scores, tokens, with_top=alternatives > 0)
    likelier = (scores > scores.gather(1, tokens[:, None])).sum(dim=-1)
    finite = scores.amax(dim=-1).isfinite()
    # One list brings all: float64 holds every token id and every float32.
    host = torch.cat([finite[:, None], likelier[:, None], tokens[:, None], report], dim=1).tolist()
    if not all(row[0] for row in host):
        return None
    return [_ranked(int(row[1]), token_logprob(int(row[2]), row[3:], alternatives)) for row in host]


def _ranked(likelier: int, token: TokenLogprob) -> TokenLogprob:
    """Return a token with its rank: its place among the listed ones, of which equals are ordered, else as counted."""
    listed = [each for each, _ in token.top]
    rank = listed.index(token.token_id) if token.token_id in listed else likelier
    return TokenLogprob(token.token_id, token.logprob, token.top, rank + 1)
