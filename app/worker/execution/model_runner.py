"""The model runner: segments of sequences in, logits out, through whichever executor was selected."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from app.ipc.messages import Compiled
from app.types import StepTimes
from app.worker.execution.base import DecodingExecutor, Executor, ExecutorUnavailableError
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.packed_batch import Segment

REFERENCE_TOKENS = 24
"""Tokens of the random prompt on which executors are compared."""
NOISE_FACTOR = 2
"""Two roundings of the same logits may be this much farther apart than one of them is from exact ones."""
MAX_EXPLAINED = 0.3
"""A difference that is never put down to rounding: with so much of it, a wrong executor could not be told apart."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the distance of logits, as a share of their norm, or NaN."""
    return float((found - expected).norm() / expected.norm())


def allowed_error(tolerance: float, noise: float) -> float:
    """Return how far logits may be from others that were computed in another way, as a share of their norm."""
    return max(tolerance, NOISE_FACTOR * noise)


class ModelRunner:
    """A causal language model with its KV cache."""

    def __init__(self, model: Any, cache: KVCache, executor: Executor, *, noise: float = 0) -> None:
        """Args: noise: how far rounding moves the model's logits, as a share of their norm."""
        self.model = model
        self.cache = cache
        self.executor = executor
        self.noise = noise
        self.record: Callable[[Callable[[], None]], Callable[[], None]] | None = None
        """What makes of launches that are always the same one that is faster, where the device has that."""
        self.step_times: tuple[StepTimes, ...] = ()
        """What steps take in each way of execution, where that was measured."""
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        """Tokens that it computes logits for."""

    @property
    def compiled(self) -> Compiled | None:
        """Return the parts of the model that are compiled for this machine."""
        return self.executor.compiled

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], wanted: Sequence[int]) -> Tensor:
        """Compute the segments and return the logits after the wanted tokens, (wanted, vocab).

        Args:
            segments: decode tokens first, by slot; then prefill chunks; every slot at most once.
            wanted: for each segment, after how many of its last tokens the logits are needed; one where it is True.
        """
        return self.executor.forward(self.cache.pack(segments, wanted))

    @torch.inference_mode()
    def forward_next(self, tokens: Tensor) -> Tensor | None:
        """Compute one more token of each segment of the last `forward`, if the executor can; see there."""
        return self.executor.forward_next(tokens) if isinstance(self.executor, DecodingExecutor) else None

    def reference_logits(self) -> Tensor:
        """Return the logits of a random prompt in prefill, decode and a mixed batch; overwrites the first slots."""
        generator = torch.Generator().manual_seed(0)
        count = min(REFERENCE_TOKENS, self.cache.length)
        vocab_size = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocab_size, (count,), generator=generator).tolist()
        passes = [[Segment(0, 0, ids[: count - 2])], [Segment(0, count - 2, ids[count - 2 : count - 1])]]
        if self.cache.slots > 1:
            passes.append([Segment(0, count - 1, ids[-1:]), Segment(1, 0, ids[: count // 2])])
        return torch.cat([self.forward(segments, [True] * len(segments)) for segments in passes]).float()

    def verify_equivalence(self, reference: Tensor, tolerance: float) -> None:
        """Compare the logits with those of another executor.

        Raises: ExecutorUnavailableError: they differ by more than `tolerance`, as a share of their norm, and more than
            rounding explains.
        """
        self.verify_logits(self.reference_logits(), reference, tolerance)

    def verify_logits(self, found: Tensor, expected: Tensor, tolerance: float) -> None:
        """Compare logits of one batch that two executors computed; raises as `verify_equivalence`."""
        error = relative_error(found, expected)
        if not error <= max(tolerance, min(allowed_error(tolerance, self.noise), MAX_EXPLAINED)):
            raise ExecutorUnavailableError(f"its logits differ by {error:.2%}")

    def clear_reference_slots(self) -> None:
        """Clear NaNs that a rejected executor may have written to the KV cache."""
        for slot in range(min(2, self.cache.slots)):
            self.cache.clear_slot(slot)
