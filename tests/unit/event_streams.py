"""Reads streams of events, and picks out of the events what a test asserts."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from app.events import Delta, DetokenizedLogprob, Event, Finished, PromptLogprob, Started


async def read(stream: AsyncGenerator[Event, None]) -> list[Event]:
    """Read a stream to its end, and close it."""
    events: list[Event] = []
    await read_into(events, stream)
    return events


async def read_into(events: list[Event], stream: AsyncGenerator[Event, None]) -> None:
    """Append a stream's events to a list that is there even if the stream ends with an error."""
    async with aclosing(stream):
        async for event in stream:
            events.append(event)


def started_of(events: Sequence[Event]) -> Started:
    """Return the first event, which has to be Started."""
    assert isinstance(events[0], Started)
    return events[0]


def finished_of(events: Sequence[Event]) -> Finished:
    """Return the last event, which has to be Finished."""
    assert isinstance(events[-1], Finished)
    return events[-1]


def deltas_of(events: Sequence[Event]) -> list[Delta]:
    """Return the deltas among events."""
    return [event for event in events if isinstance(event, Delta)]


def text_of(events: Sequence[Event]) -> str:
    """Return the text of all deltas."""
    return "".join(delta.text for delta in deltas_of(events))


def logprobs_of(events: Sequence[Event]) -> list[DetokenizedLogprob]:
    """Return the log-probabilities of all deltas."""
    return [token for delta in deltas_of(events) for token in delta.logprobs]


def prompt_logprobs_of(events: Sequence[Event]) -> list[PromptLogprob]:
    """Return the log-probabilities of the prompt."""
    return [token for delta in deltas_of(events) for token in delta.prompt_logprobs]
