"""The metadata of one forward pass: its tokens, and for each the KV cache slot, the position and the visible keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from app.worker.execution.lora import AdapterSpan, LoraAdapter


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence: one token when it decodes, a chunk of the prompt in prefill."""

    slot: int
    start: int
    """Position of the first token."""
    token_ids: Sequence[int]
    adapter: LoraAdapter | None = None

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.token_ids)


class PackedBatch:
    """The tokens of all segments one after the other, without padding."""

    def __init__(self, segments: Sequence[Segment], wanted: Sequence[int], device: torch.device) -> None:
        """Args:
        segments: decode tokens first, by slot; then prefill chunks; every slot at most once.
        wanted: for each segment, after how many of its last tokens the logits are needed; one where it is True.
        """
        flat = [
            [token for segment in segments for token in segment.token_ids],
            [position for segment in segments for position in range(segment.start, segment.end)],
            [segment.slot for segment in segments for _ in segment.token_ids],
        ]
        pinned = torch.tensor(flat, dtype=torch.long, pin_memory=device.type == "cuda")
        on_device = pinned.to(device, non_blocking=True)
        self.segments = segments
        self.token_ids, self.positions = on_device[:1], on_device[1:2]
        """(1, tokens) each."""
        self.slots = on_device[2]
        """(tokens,)"""
        ends = list(accumulate(len(segment.token_ids) for segment in segments))
        indices = [index for end, count in zip(ends, wanted, strict=True) for index in range(end - count, end)]
        self.logit_indices = torch.tensor(indices, dtype=torch.long).to(device)
        """(wanted,) the tokens whose logits are needed, ascending."""
        self.adapters = [
            AdapterSpan(end - len(segment.token_ids), end, segment.adapter)
            for end, segment in zip(ends, segments, strict=True)
            if segment.adapter is not None
        ]
        """The tokens that have one, ascending."""
        self._key_ranges: dict[int | None, tuple[Tensor, Tensor]] = {}

    @property
    def size(self) -> int:
        """Tokens in the batch."""
        return self.token_ids.shape[1]

    def key_range(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return the first key that each token sees and the one after its last, computed once for all layers."""
        if window not in self._key_ranges:
            end = self.positions[0] + 1
            first = torch.zeros_like(end) if window is None else (end - window).clamp_(min=0)
            self._key_ranges[window] = first, end
        return self._key_ranges[window]
