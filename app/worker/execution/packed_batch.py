"""The metadata of one forward pass: its tokens, and for each the KV cache slot, the position and the visible keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from app.worker.execution.lora import AdapterSpan, LoraAdapter


@dataclass(frozen=True, slots=True)
class DeviceToken:
    """A token that was sampled on the device, and that the host has not read."""

    tokens: Tensor
    """(rows,) int64, those of one step."""
    row: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence: one token when it decodes, a chunk of the prompt in prefill."""

    slot: int
    start: int
    """Position of the first token."""
    token_ids: Sequence[int]
    adapter: LoraAdapter | None = None
    device_token: DeviceToken | None = None
    """Its only token, in place of the one in `token_ids`."""

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
        self.segments = segments
        self.wanted = wanted
        self._device = device
        ends = list(accumulate(len(segment.token_ids) for segment in segments))
        self._logit_indices = [
            index for end, count in zip(ends, wanted, strict=True) for index in range(end - count, end)
        ]
        self.adapters = [
            AdapterSpan(end - len(segment.token_ids), end, segment.adapter)
            for end, segment in zip(ends, segments, strict=True)
            if segment.adapter is not None
        ]
        """The tokens that have one, ascending."""
        self._key_ranges: dict[int | None, tuple[Tensor, Tensor]] = {}

    @cached_property
    def inputs(self) -> Tensor:
        """(3, tokens) on the device: token ids, positions and slots."""
        flat = [
            [token for segment in self.segments for token in segment.token_ids],
            [position for segment in self.segments for position in range(segment.start, segment.end)],
            [segment.slot for segment in self.segments for _ in segment.token_ids],
        ]
        inputs = _pinned(flat, self._device).to(self._device, non_blocking=True)
        _fill_in(inputs, self.segments)
        return inputs

    @property
    def token_ids(self) -> Tensor:
        """(1, tokens)"""
        return self.inputs[:1]

    @property
    def positions(self) -> Tensor:
        """(1, tokens)"""
        return self.inputs[1:2]

    @property
    def slots(self) -> Tensor:
        """(tokens,)"""
        return self.inputs[2]

    @cached_property
    def logit_indices(self) -> Tensor:
        """(wanted,) the tokens whose logits are needed, ascending."""
        return _pinned(self._logit_indices, self._device).to(self._device, non_blocking=True)

    @property
    def size(self) -> int:
        """Tokens in the batch."""
        return self.inputs.shape[1]

    def key_range(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return the first key that each token sees and the one after its last, computed once for all layers."""
        if window not in self._key_ranges:
            end = self.positions[0] + 1
            first = torch.zeros_like(end) if window is None else (end - window).clamp_(min=0)
            self._key_ranges[window] = first, end
        return self._key_ranges[window]


class StaticBatch(PackedBatch):
    """A decode batch of one token for each slot, in tensors at fixed addresses, as recorded graphs need them."""

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__([], [], device)
        self.inputs = torch.zeros((3, rows), dtype=torch.long, device=device)
        self.logit_indices = torch.arange(rows, device=device)
        self._segments = rows
        self._sources = torch.arange(rows, device=device)
        """(rows,) which segment each row is of."""

    def load(self, segments: Sequence[Segment]) -> None:
        """Take the tokens of segments of one token each; the last one stands in the rows that are left, too."""
        columns = [(segment.token_ids[0], segment.start, segment.slot) for segment in segments]
        columns += columns[-1:] * (self.size - len(columns))
        self.inputs.copy_(_pinned(list(zip(*columns, strict=True)), self.inputs.device), non_blocking=True)
        _fill_in(self.inputs, [*segments, *[segments[-1]] * (self.size - len(segments))])
        if self._segments != len(segments):
            self._segments = len(segments)
            torch.arange(self.size, out=self._sources).clamp_(max=self._segments - 1)

    def advance(self, tokens: Tensor) -> None:
        """Take the next token of each segment, (segments,) int64, in place of the one that it has."""
        self.inputs[1] += 1
        torch.index_select(tokens, 0, self._sources, out=self.inputs[0])


def _fill_in(inputs: Tensor, segments: Sequence[Segment]) -> None:
    """Write the tokens that only the device knows into the first row of `inputs`."""
    if all(segment.device_token is None for segment in segments):
        return
    starts = [0, *accumulate(len(segment.token_ids) for segment in segments)]
    known = [(place, each.device_token) for place, each in zip(starts, segments, strict=False) if each.device_token]
    token_ids = inputs[0]
    places, rows, tokens = [place for place, _ in known], [token.row for _, token in known], known[0][1].tokens
    if places == rows == list(range(len(rows))):
        token_ids[: len(rows)] = tokens[: len(rows)]
        return
    index = _pinned([places, rows], token_ids.device).to(token_ids.device, non_blocking=True)
    token_ids.index_copy_(0, index[0], tokens.index_select(0, index[1]))


def _pinned(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return numbers on the host, from where a copy to the device waits for nothing."""
    return torch.tensor(values, dtype=torch.long, pin_memory=device.type == "cuda")
