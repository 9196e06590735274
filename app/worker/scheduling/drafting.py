"""Which guesses of next tokens a step computes: those of sequences that decode, as many as a step may hold."""

from collections.abc import Mapping
from dataclasses import replace

from app.worker.scheduling.live_request import LiveRequest
from app.worker.scheduling.schedule import Schedule
from app.worker.scheduling.speculation import MIN_DRAFT, STEP_DRAFTS


def with_drafts(planned: Schedule, live: Mapping[int, LiveRequest], length: int) -> Schedule:
    """Add guesses to the sequences of a step that decode.  Args: length: tokens that fit a KV cache slot."""
    decodes = [each for each in planned.tokens if each.sequence.uncomputed_tokens == 1]
    share = STEP_DRAFTS // max(1, len(decodes))
    if share < MIN_DRAFT:
        return planned
    drafted = [replace(each, draft=_draft(live[each.sequence.request_id], share, length)) for each in decodes]
    others = [each for each in planned.tokens if each.sequence.uncomputed_tokens > 1]
    # One token each first, then several, as the KV cache takes them.
    return replace(planned, tokens=[*sorted(drafted, key=lambda each: bool(each.draft)), *others])


def _draft(live: LiveRequest, limit: int, length: int) -> tuple[int, ...]:
    sequence = live.sequence
    if live.drafter is None or sequence.is_background:
        return ()
    free = length - len(sequence.token_ids)
    return live.drafter.propose(sequence.token_ids, max(0, min(limit, live.tokens_left - 1, free)))
