"""Steps that are launched before the tokens of the last one are read, so that a GPU need not wait for the host.

Decides which steps that can be, and starts them.  The tokens that a step samples are fed to the next one where they
are; the runner reads them when that has been launched, and appends them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import DeviceToken, Segment
from app.worker.sampling.device_sampler import DeviceSampler, DeviceTokens, SampledRow
from app.worker.scheduling.live_request import LiveRequest
from app.worker.scheduling.schedule import ScheduledTokens


@dataclass(slots=True)
class InFlight:
    """A step that the device computes, and whose tokens the host has not read."""

    sampled: DeviceTokens
    rows: dict[int, int]
    """Requests that have not ended -> their rows of `sampled`."""
    began: float
    """When the device began with it, in seconds of the runner's clock."""
    tokens: int
    prefill: int
    """How many of its tokens are of prompts."""

    def token_of(self, request_id: int) -> DeviceToken:
        """Return the token that it samples for a request."""
        return DeviceToken(self.sampled.tokens, self.rows[request_id])


def launchable(tokens: Sequence[ScheduledTokens], live: Mapping[int, LiveRequest]) -> list[ScheduledTokens] | None:
    """Return what of a step can be launched: all but sequences whose last token is in flight.

    None where the host has to see the step's tokens or logits, or the token before, or none is to be sampled.
    """
    wanted = list[ScheduledTokens]()
    for each in tokens:
        request = live[each.sequence.request_id]
        most = request.request.params.max_tokens
        if each.scored or not most or not DeviceSampler.supports(request.sampler):
            return None
        if request.completion_tokens + each.sequence.in_flight < most:
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
    sampled = sampler.sample(logits, [_row(live[each.request_id]) for each in sequences])
    for sequence in sequences:
        sequence.in_flight += 1
    return InFlight(
        sampled=sampled,
        rows={each.request_id: row for row, each in enumerate(sequences)},
        began=now,
        tokens=sum(each.count for each in tokens),
        prefill=sum(each.count for each in tokens if each.count > 1),
    )


def _row(live: LiveRequest) -> SampledRow:
    slot = live.sequence.slot
    assert slot is not None  # noqa: S101  # the schedule gave it one
    return SampledRow(slot, live.sampler, live.sampler.sampled_tokens + live.sequence.in_flight)
