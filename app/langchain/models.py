"""LangChain's face of an engine: a HuggingFacePipeline and a ChatHuggingFace that generate through `Engine`.

Both classes are what their names say (isinstance holds) and work in anyone's chain, sync and async, whole and streamed,
with usage, finish reason and log-probabilities in LangChain's own places.  Closing their stream closes the engine's.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, nullcontext
from dataclasses import fields, replace
from functools import reduce
from operator import add
from typing import Any, Literal, TypeVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.globals import get_debug, get_verbose
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, Generation, GenerationChunk, LLMResult
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from langsmith.utils import tracing_is_enabled
from msgspec import structs
from pydantic import ConfigDict

from app.engine.base import Engine
from app.events import Event
from app.langchain.engine_loop import submit
from app.langchain.messages import (
    EventGenerationChunk,
    EventMessageChunk,
    EventText,
    chat_generation_chunk,
    from_langchain,
)
from app.langchain.structured_output import structured_output
from app.langchain.tools import split_chat_arguments
from app.requests import GenerationRequest
from app.types import SamplingParams, Tenant

T = TypeVar("T")

_PARAM_NAMES = frozenset(field.name for field in fields(SamplingParams))


def is_observed(config: RunnableConfig) -> bool:
    """Return whether anybody listens to the runs under this configuration: callbacks, a tracer, debug output."""
    return bool(config.get("callbacks")) or get_debug() or get_verbose() or bool(tracing_is_enabled())


class EnginePipeline(HuggingFacePipeline):
    """A HuggingFacePipeline whose model runs behind `Engine`: cancellable, with stop strings, usage and errors.

    Example: `llm.invoke("Once upon a time", max_tokens=40, temperature=0, stop=["The end"])`
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    engine: Any
    """The `Engine`; typed loosely because pydantic cannot check a Protocol without running its properties."""
    loop: asyncio.AbstractEventLoop | None = None
    """The event loop of the engine; the sync methods hand their work to it and raise where it is None."""
    defaults: SamplingParams = SamplingParams(max_tokens=256)
    cache: Any = False
    """LangChain's own cache leaves the arguments of a call out of its key, so not even a global one is used."""

    @property
    def _llm_type(self) -> str:
        return "engine_pipeline"

    async def open(
        self, stop: list[str] | None, kwargs: Mapping[str, Any], **prompt: Any
    ) -> AbstractAsyncContextManager[AsyncGenerator[Event, None]]:
        """Return the engine's stream, to be entered; the one place where LangChain's side meets the engine's.

        Args:
            stop, kwargs: of a call: `request`, which the service binds, or sampling parameters by their names.
            prompt: `text` or `messages`; encoded unless the request brings its token ids.
        """
        engine: Engine = self.engine
        bound = kwargs.get("request")
        if isinstance(bound, GenerationRequest):
            request = bound if bound.prompt_ids is not None else structs.replace(bound, **prompt)
        else:
            request = self._request(stop, kwargs, prompt)
            request = structs.replace(request, prompt_ids=(await engine.prepare(request)).prompt_ids)
        stream = aclosing(engine.stream(request))
        if isinstance(streams := kwargs.get("streams"), AsyncExitStack):
            # LangChain leaves an abandoned generator to the garbage collector, which closes it in a task of its own at
            # some later time.  So `astream` alone closes what is below: two that did would get in each other's way.
            return nullcontext(await streams.enter_async_context(stream))
        return stream

    def _request(self, stop: list[str] | None, kwargs: Mapping[str, Any], prompt: dict[str, Any]) -> GenerationRequest:
        """Make a request of keyword arguments named as in `SamplingParams`.

        Raises: ValueError: an argument that nothing would honour.
        """
        given = {name: value for name, value in kwargs.items() if name != "streams"}
        if unknown := sorted(given.keys() - _PARAM_NAMES):
            raise ValueError(f"unknown generation arguments: {', '.join(unknown)}; known: {', '.join(_PARAM_NAMES)}")
        sampling = replace(self.defaults, **given)
        if stop:
            sampling = replace(sampling, stop=tuple(stop))
        return GenerationRequest(id=f"chain-{uuid.uuid4().hex}", tenant=Tenant.program(), sampling=sampling, **prompt)

    async def astream(
        self,
        input: LanguageModelInput,  # noqa: A002  # LangChain's own name
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        """Yield text that carries its events; closing this closes the engine's stream."""
        config = ensure_config(config)
        if is_observed(config) or self.callbacks or self.verbose:
            async with AsyncExitStack() as streams:
                base: Any = super().astream(input, config, stop=stop, streams=streams, **kwargs)
                async with aclosing(base):
                    async for text in base:
                        yield text
                return
        async with aclosing(self.astream_unobserved(self._convert_input(input), stop=stop, **kwargs)) as texts:
            async for text in texts:
                yield text

    async def astream_unobserved(
        self, prompt: PromptValue, *, stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncGenerator[EventText, None]:
        """Yield the same without reporting a run to callbacks."""
        async with await self.open(stop, kwargs, text=prompt.to_string()) as events:
            async for event in events:
                yield EventText.of(event)

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        async with await self.open(stop, kwargs, text=prompt) as events:
            async for event in events:
                chunk = EventGenerationChunk.of(event, self.model_id)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        async def whole(prompt: str) -> Generation:
            chunks = [chunk async for chunk in self._astream(prompt, stop, run_manager, **kwargs)]
            total = reduce(add, chunks)
            return Generation(text=total.text, generation_info=total.generation_info)

        generations = await asyncio.gather(*map(whole, prompts))
        return LLMResult(generations=[[each] for each in generations], llm_output={"model_name": self.model_id})

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        for chunk in _drive(self._astream(prompt, stop, **kwargs), self.loop):
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        result: LLMResult = submit(self._agenerate(prompts, stop, **kwargs), self.loop).result()
        return result


class EngineChat(ChatHuggingFace):
    """A ChatHuggingFace over an EnginePipeline: the model's own chat template, applied to tokens, never to text."""

    cache: Any = False
    """As for `EnginePipeline`."""

    def _resolve_model_id(self) -> None:
        # The inherited method would load a second tokenizer (and torch with it) into this process.
        self.model_id = self.llm.model_id

    @property
    def _llm_type(self) -> str:
        return "engine_chat"

    def bind_tools(
        self,
        tools: Sequence[Any],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return this model with tools that it may ask for.

        Args:
            tools: Python functions, Pydantic classes, LangChain's tools, or OpenAI's objects.
            tool_choice: auto, none, any or True (some tool must be called), or the name of the one that must be.
            strict: whether the arguments of every call follow the schema.
        """
        formatted = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return self.bind(tools=formatted, **kwargs)

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: Literal["function_calling", "json_mode", "json_schema"] = "json_schema",
        include_raw: bool = False,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return this model with answers that follow a schema, parsed: a Pydantic class gives its instances.

        Args:
            schema: a Pydantic class, a TypedDict, or a JSON Schema; of `json_mode` it is only what is parsed.
            method: `json_schema` lets the sampler allow nothing else; `function_calling` makes a tool of it that must
                be called; `json_mode` asks for any object.
            include_raw: return the message too, and an error of parsing in place of raising it.
        Raises: ValueError: there is no schema, or an argument that nothing would honour.
        """
        return structured_output(self, schema, method=method, include_raw=include_raw, **kwargs)

    async def astream(
        self,
        input: LanguageModelInput,  # noqa: A002  # LangChain's own name
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """Yield message chunks that carry their events; closing this closes the engine's stream."""
        config = ensure_config(config)
        if "request" not in kwargs or is_observed(config) or self.callbacks or self.verbose:
            async with AsyncExitStack() as streams:
                base: Any = super().astream(input, config, stop=stop, streams=streams, **kwargs)
                async with aclosing(base):
                    async for message in base:
                        yield message
                return
        async with aclosing(self.astream_unobserved(self._convert_input(input), stop=stop, **kwargs)) as messages:
            async for message in messages:
                yield message

    async def astream_unobserved(
        self, prompt: PromptValue, *, stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncGenerator[EventMessageChunk, None]:
        """Yield the same without reporting a run to callbacks."""
        async with await self._open(prompt.to_messages(), stop, kwargs) as events:
            async for event in events:
                yield EventMessageChunk.of(event)

    async def _open(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> AbstractAsyncContextManager[AsyncGenerator[Event, None]]:
        pipeline: EnginePipeline = self.llm
        bound = kwargs.get("request")
        encoded = isinstance(bound, GenerationRequest) and bound.prompt_ids is not None
        if encoded:
            return await pipeline.open(stop, kwargs)
        fields, others = split_chat_arguments(kwargs)
        return await pipeline.open(stop, others, messages=tuple(map(from_langchain, messages)), **fields)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with await self._open(messages, stop, kwargs) as events:
            async for event in events:
                yield chat_generation_chunk(event, self.model_id)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        stream: bool | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        yield from _drive(self._astream(messages, stop, **kwargs), self.llm.loop)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        stream: bool | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        result: ChatResult = submit(self._agenerate(messages, stop, **kwargs), self.llm.loop).result()
        return result


def _drive(stream: AsyncIterator[T], loop: asyncio.AbstractEventLoop | None) -> Iterator[T]:
    """Iterate an async generator of the engine's loop from another thread; leaving early closes it."""
    iterator: Any = stream
    try:
        while True:
            try:
                yield submit(_next(iterator), loop).result()
            except StopAsyncIteration:
                return
    finally:
        submit(iterator.aclose(), loop).result()


async def _next(iterator: AsyncIterator[T]) -> T:
    return await anext(iterator)
