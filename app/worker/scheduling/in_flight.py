"""Steps that are launched before the tokens of the last one are read, so that a GPU need not wait for the host.

Decides which steps that can be, and starts them.  The tokens that a step samples are fed to the next one where they
are; the runner reads them when that has been launched, and appends them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import DeviceToken, Segment
from app.worker.sampling.device_sampler import DeviceSampler, DeviceTokens
from app.worker.sampling.sampling_step import SampledRow
from app.worker.scheduling import schedule
from app.worker.scheduling.live_request import LiveRequest
from app.worker.scheduling.schedule import ScheduledTokens


@dataclass(slots=True)
class InFlight:
    """A step that the device computes, and whose tokens the host has not read."""

    sampled: DeviceTokens
    sequences: Sequence[schedule.Sequence]
    """Whose tokens they are, row by row."""
    rows: dict[int, int]
    """Requests that have not ended, and whose token is not to be sampled again -> their rows of `sampled`."""
    began: float
    """When the device began with it, in seconds of the runner's clock."""
    tokens: int
    prefill: int
    """How many of its tokens are of prompts."""
    left: int
    """Tokens after this one that each of the sequences may have."""

    def token_of(self, request_id: int) -> DeviceToken:
        """Return the token that it samples for a request."""
        return DeviceToken(self.sampled.tokens, self.rows[request_id])

    def is_continued_by(self, tokens: Sequence[ScheduledTokens]) -> bool:
        """Return whether a step is one more token of each of its sequences, none of which is known to have ended."""
        return (
            self.left > 0
            and len(self.rows) == len(self.sequences) == self.tokens
            and self.sequences == [each.sequence for each in tokens]
        )


def launchable(tokens: Sequence[ScheduledTokens], live: Mapping[int, LiveRequest]) -> list[ScheduledTokens] | None:
    """Return what of a step can be launched: all but sequences whose last token is in flight.

    None where the host has to see the step's tokens or logits, or the token before, or none is to be sampled.
    """
    wanted = list[ScheduledTokens]()
    for each in tokens:
        request = live[each.sequence.request_id]
        if each.scored or not request.request.params.max_tokens or not DeviceSampler.supports(request.sampler):
            return None
        if request.tokens_left:
            wanted.append(each)
    return wanted


def launch(
    model_runner: ModelRunner,
    sampler: DeviceSampler,
    tokens: Sequence[ScheduledTokens],
    segments: Sequence[Segment],
    live: Mapping[int, LiveRequest],
    *,
    now: float,
) -> InFlight:
    """Start a step; its sequences have a token more in flight then.

    Args:
        segments: one for each of `tokens`.
        now: in seconds of the runner's clock.
    """
    logits = model_runner.forward(segments, [each.completes for each in tokens])
    sequences = [each.sequence for each in tokens if each.completes]
    requests = [live[each.request_id] for each in sequences]
    sampled = sampler.sample(logits, [_row(each) for each in requests])
    return _in_flight(
        sampled,
        sequences,
        began=now,
        tokens=sum(each.count for each in tokens),
        prefill=sum(each.count for each in tokens if each.count > 1),
        left=min((each.tokens_left for each in requests), default=0) - 1,
    )


def launch_next(model_runner: ModelRunner, sampler: DeviceSampler, last: InFlight, *, now: float) -> InFlight | None:
    """Start the step that continues the last one, with nothing laid out row by row; None if that cannot be."""
    logits = model_runner.forward_next(last.sampled.tokens)
    if logits is None:
        return None
    sampled = sampler.sample_next(logits)
    return _in_flight(sampled, last.sequences, began=now, tokens=last.tokens, prefill=0, left=last.left - 1)


def _in_flight(sampled: DeviceTokens, sequences: Sequence[schedule.Sequence], **facts: Any) -> InFlight:
    for sequence in sequences:
        sequence.in_flight += 1
    return InFlight(sampled, sequences, {each.request_id: row for row, each in enumerate(sequences)}, **facts)


def _row(live: LiveRequest) -> SampledRow:
    slot = live.sequence.slot
    assert slot is not None  # noqa: S101  # the schedule gave it one
    return SampledRow(slot, live.sampler, live.sampler.sampled_tokens + live.sequence.in_flight)
