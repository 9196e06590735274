"""Turns what a model writes in a chat into answer, reasoning and calls of tools.

Stands right around the engine, so that filters, caches and dialects see messages and not the model's own marks.  What
it cannot read as a call it leaves in the text: nothing that the model writes is lost.
"""

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace

from msgspec import structs

from app.engine.base import ChatFormat
from app.engine.parsing.answer_stops import AnswerStops
from app.engine.parsing.completion_parser import CompletionParser
from app.engine.parsing.deltas import DeltaBuilder
from app.engine.parsing.output import Part
from app.engine.parsing.tool_grammar import with_grammar
from app.engine.stop_strings import hidden_stops, with_stop_tokens
from app.engine.wrapper import EngineWrapper
from app.errors import EngineNotReady, InvalidRequest
from app.events import Delta, Event, Finished, FinishedSample
from app.requests import GenerationRequest
from app.types import FinishReason, Usage

_PLACE = re.compile(r" \(line \d+, column \d+\)$")


class ParsedEngine(EngineWrapper):
    """Parses the chats of the inner engine with the formats that it names."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate; a request with nothing to parse gets the inner engine's own stream."""
        try:
            info = self._inner.info
        except EngineNotReady:
            return self._inner.stream(request)
        if not request.is_chat or not _is_parsed(info.chat_format, request):
            return self._inner.stream(request)
        return self._parsed(request, info.chat_format)

    async def _parsed(self, request: GenerationRequest, chat_format: ChatFormat) -> AsyncGenerator[Event, None]:
        prompt_end = self._inner.prompt_end(request.prompt_ids or ())
        hidden = hidden_stops(request.sampling, self._inner) if request.sampling.stop else {}
        completion = _Completion(request, chat_format, prompt_end, hidden)
        constrained = with_grammar(request, self._inner.info, inside=completion.begins_inside)
        async with aclosing(self._inner.stream(_raw(constrained, chat_format, hidden))) as events:
            try:
                async for event in events:
                    if isinstance(event, Delta):
                        yield completion.feed(event)
                        if (end := completion.end) is not None:
                            yield end
                            return
                    elif isinstance(event, Finished):
                        delta, end = completion.finish(event)
                        if delta.is_visible:
                            yield delta
                        yield end
                    else:
                        yield event
            except InvalidRequest as error:
                raise error if request.sampling.grammar else _refusal(error) from None


def _is_parsed(chat_format: ChatFormat, request: GenerationRequest) -> bool:
    return chat_format.reasoning is not None or chat_format.is_harmony or _may_call(request)


def _may_call(request: GenerationRequest) -> bool:
    return bool(request.tools) and request.tool_choice.mode != "none"


def _refusal(error: InvalidRequest) -> InvalidRequest:
    """Return an error in the caller's words: a grammar that it did not send is that of its tools."""
    for each in (error.details or {}).get("errors", ()):
        if each["field"] == "grammar":
            return InvalidRequest.of_field("tools", f"have a schema that {_PLACE.sub('', each['reason'])}")
    return error


def _raw(request: GenerationRequest, chat_format: ChatFormat, hidden: Mapping[int, str]) -> GenerationRequest:
    """Return what the inner engine generates: without stop strings, which are for the answer only.

    Those that name tokens which no text shows are stop tokens of all of the completion.
    """
    params = request.sampling
    # Deltas as they are generated where the completion may have to be ended, or it would be when all had been.
    streams = request.stream or bool(params.stop) or (_may_call(request) and not request.parallel_tool_calls)
    sampling = with_stop_tokens(replace(params, stop=()), hidden)
    return structs.replace(request, sampling=sampling, stream=streams, shown_tokens=chat_format.special_marks)


class _Completion:
    """One completion while it is parsed."""

    def __init__(
        self, request: GenerationRequest, chat_format: ChatFormat, prompt_end: str, hidden: Mapping[int, str]
    ) -> None:
        """Begin.  Args: hidden: the stop strings that name tokens which no text shows, by those tokens."""
        tools = {tool.name: tool for tool in request.tools} if _may_call(request) else {}
        if request.tool_choice.name is not None:
            tools = {name: tool for name, tool in tools.items() if name == request.tool_choice.name}
        self._request = request
        self._hidden = hidden
        self._parser = CompletionParser(
            chat_format,
            tools,
            prompt_end,
            continued=request.messages[-1].content if request.continue_final_message else None,
            parallel=request.parallel_tool_calls,
        )
        self._stops = AnswerStops(request.sampling.stop)
        self._deltas = DeltaBuilder()

    @property
    def begins_inside(self) -> bool:
        """Return whether it begins within the reasoning."""
        return self._parser.begins_inside

    @property
    def end(self) -> Finished | None:
        """Return its last event if it has to be ended now."""
        if self._stops.matched is not None:
            return self._finished(FinishReason.STOP, self._stops.matched)
        return self._finished(FinishReason.TOOL_CALLS) if self._parser.output.is_over else None

    def feed(self, delta: Delta) -> Delta:
        """Return what a raw delta becomes."""
        self._deltas.follow(delta)
        parts = self._stops.feed(self._parser.feed(delta.text))
        if self._parser.output.is_over:
            parts += self._stops.finish()
        return self._deltas.build(parts, tokens=delta.tokens)

    def finish(self, event: Finished) -> tuple[Delta, Finished]:
        """Return what is left, and the last event that follows from the inner one."""
        sample = event.samples[0]
        parts: list[Part] = self._stops.feed(self._parser.finish(cut=sample.breaks_off))
        parts += self._stops.finish()
        stop = self._stops.matched
        delta = self._deltas.build(parts, last=stop is None)
        if stop is not None:
            return delta, self._finished(FinishReason.STOP, stop)
        reason = sample.finish_reason
        if reason is FinishReason.STOP and self._parser.output.calls:
            reason = FinishReason.TOOL_CALLS
        changed = structs.replace(
            sample,
            finish_reason=reason,
            stop_reason=self._stop_reason(sample.stop_reason),
            reasoning_tokens=self._reasoning_tokens(),
        )
        return delta, structs.replace(event, samples=(changed,))

    def _stop_reason(self, reason: str | int | None) -> str | int | None:
        """Return why the model stopped in the caller's own words: a stop string may have become a token."""
        if not isinstance(reason, int) or reason in self._request.sampling.stop_token_ids:
            return reason
        return self._hidden.get(reason, reason)

    def _finished(self, reason: FinishReason, stop_reason: str | None = None) -> Finished:
        progress = self._request.progress
        sample = FinishedSample(
            finish_reason=reason,
            completion_tokens=progress.generated,
            stop_reason=stop_reason,
            reasoning_tokens=self._reasoning_tokens(),
        )
        return Finished(
            samples=(sample,), usage=Usage(self._request.prompt_tokens, progress.generated, progress.cached)
        )

    def _reasoning_tokens(self) -> int:
        return self._deltas.tokens_within(self._parser.output.thoughts)
