"""LangChain's face of the engine: a HuggingFacePipeline and a ChatHuggingFace that generate through `Engine`.

Alone in knowing LangChain.  Both classes are what their names say (isinstance holds) and work in anyone's chain, sync
and async, whole and streamed, with usage, finish reason and log-probabilities in LangChain's own places.  User text is
only ever a message or the value of a variable, never part of a template.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import fields, replace
from functools import reduce
from operator import add
from typing import Any, TypeVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.chat_models import agenerate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult, Generation, GenerationChunk, LLMResult
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import Runnable
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from pydantic import ConfigDict

from app.engine.base import Chunk, Engine, GenerationRequest
from app.langchain.call import Call
from app.langchain.chunk_info import chunk_info
from app.types import Message, Role, SamplingParams, Usage

T = TypeVar("T")

_PARAM_NAMES = frozenset(field.name for field in fields(SamplingParams))


class EnginePipeline(HuggingFacePipeline):
    """A HuggingFacePipeline whose model runs behind `Engine`: cancellable, with stop strings, usage and errors.

    Example: `llm.invoke("Once upon a time", max_tokens=40, temperature=0, stop=["The end"])`
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    engine: Any
    """The `Engine`; typed loosely because pydantic cannot check a Protocol without running its properties."""
    loop: asyncio.AbstractEventLoop | None = None
    """Where the engine lives; the sync methods hand their work to it and raise where it is None."""
    defaults: SamplingParams = SamplingParams(max_tokens=256)

    @property
    def _llm_type(self) -> str:
        return "engine_pipeline"

    async def chunks(self, prompt_ids: tuple[int, ...], call: Call) -> AsyncGenerator[Chunk, None]:
        """Generate from tokens; the one place where LangChain's side meets the engine's."""
        engine: Engine = self.engine
        request = GenerationRequest(
            id=call.request_id, tenant=call.tenant, prompt_ids=prompt_ids, params=call.params, cache=call.cache
        )
        stream = engine.stream(request)
        if call.opened is not None:
            call.opened(stream)
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                if call.see is not None:
                    call.see(chunk)
                yield chunk

    def call(self, stop: list[str] | None, kwargs: dict[str, Any]) -> Call:
        """Return the Call bound by the service, or make one of keyword arguments named as in `SamplingParams`.

        Raises: ValueError: an argument that nothing would honour.
        """
        if isinstance(bound := kwargs.get("call"), Call):
            return bound
        if unknown := sorted(kwargs.keys() - _PARAM_NAMES):
            raise ValueError(f"unknown generation arguments: {', '.join(unknown)}; known: {', '.join(_PARAM_NAMES)}")
        params = replace(self.defaults, **kwargs)
        if stop:
            params = replace(params, stop=tuple(stop))
        return Call(request_id=f"chain-{uuid.uuid4().hex}", tenant="chain", params=params)

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        call = self.call(stop, kwargs)
        prompt_ids = call.prompt_ids
        if prompt_ids is None:
            # A thread: a long prompt would hold up every other request of the event loop.
            prompt_ids = tuple(await asyncio.to_thread(self.engine.tokenizer.encode_text, prompt))
        async with aclosing(self.chunks(prompt_ids, call)) as chunks:
            async for chunk in chunks:
                info = chunk_info(chunk, self.model_id, self.engine)
                generation = GenerationChunk(text=chunk.text, generation_info=info)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=generation)
                yield generation

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        async def whole(prompt: str) -> Generation:
            pieces = [piece async for piece in self._astream(prompt, stop, run_manager, **kwargs)]
            answer = reduce(add, pieces)
            return Generation(text=answer.text, generation_info=answer.generation_info)

        answers = await asyncio.gather(*map(whole, prompts))
        return LLMResult(generations=[[answer] for answer in answers], llm_output={"model_name": self.model_id})

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
        whole: LLMResult = _submit(self._agenerate(prompts, stop, **kwargs), self.loop).result()
        return whole


class EngineChat(ChatHuggingFace):
    """A ChatHuggingFace over an EnginePipeline: the model's own chat template, applied to tokens, never to text."""

    def _resolve_model_id(self) -> None:
        # The inherited method would load a second tokenizer (and torch with it) into this process.
        self.model_id = self.llm.model_id

    @property
    def _llm_type(self) -> str:
        return "engine_chat"

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        pipeline: EnginePipeline = self.llm
        spoken = list(map(from_langchain, messages))
        call = pipeline.call(stop, kwargs)
        prompt_ids = await asyncio.to_thread(pipeline.engine.tokenizer.encode_chat, spoken, go_on=call.go_on)
        async with aclosing(pipeline.chunks(prompt_ids, call)) as chunks:
            async for chunk in chunks:
                message = AIMessageChunk(
                    content=chunk.text,
                    usage_metadata=_usage_metadata(chunk.usage),
                    chunk_position="last" if chunk.finish_reason else None,
                )
                info = chunk_info(chunk, self.model_id, pipeline.engine)
                yield ChatGenerationChunk(message=message, generation_info=info)

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
        whole: ChatResult = _submit(self._agenerate(messages, stop, **kwargs), self.llm.loop).result()
        return whole


class Chains:
    """The two chains of the service over one engine; lives as long as the engine."""

    def __init__(self, engine: Engine, model: str) -> None:
        pipeline = EnginePipeline(engine=engine, model_id=model)
        self._completion_prompt = PromptTemplate.from_template("{prompt}")
        self._completion = pipeline
        self._chat_prompt = ChatPromptTemplate.from_messages(
            [("system", "{system}"), MessagesPlaceholder("conversation")]
        )
        self._chat = EngineChat(llm=pipeline)

    async def complete(self, prompt: str, call: Call) -> AsyncGenerator[str, None]:
        """Run `PromptTemplate | EnginePipeline`; yields text, first an empty one when admitted."""
        chain: Runnable[Any, str] = self._completion_prompt | self._completion.bind(call=call)
        async for text in chain.astream({"prompt": prompt}):
            yield text

    async def chat(self, system: str, conversation: Sequence[Message], call: Call) -> AsyncGenerator[str, None]:
        """Run `ChatPromptTemplate | EngineChat`; yields text, first an empty one when admitted."""
        chain: Runnable[Any, BaseMessage] = self._chat_prompt | self._chat.bind(call=call)
        variables = {"system": system, "conversation": [to_langchain(message) for message in conversation]}
        async for message in chain.astream(variables):
            yield message.text


def to_langchain(message: Message) -> BaseMessage:
    """Make the message object that stands for ours; content is data, whatever braces it holds."""
    match message.role:
        case Role.SYSTEM:
            return SystemMessage(message.content)
        case Role.USER:
            return HumanMessage(message.content)
        case Role.ASSISTANT:
            return AIMessage(message.content)
        case Role.TOOL:
            return ToolMessage(message.content, tool_call_id="")


def from_langchain(message: BaseMessage) -> Message:
    """Raises: ValueError: a kind of message that no chat template of ours takes."""
    match message:
        case SystemMessage():
            return Message(Role.SYSTEM, message.text)
        case HumanMessage():
            return Message(Role.USER, message.text)
        case AIMessage():
            return Message(Role.ASSISTANT, message.text)
        case ToolMessage():
            return Message(Role.TOOL, message.text)
    raise ValueError(f"messages of type {message.type} are not supported")


def _usage_metadata(usage: Usage | None) -> UsageMetadata | None:
    if usage is None:
        return None
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def _submit(work: Any, loop: asyncio.AbstractEventLoop | None) -> Future[Any]:
    """Run a coroutine on the engine's loop from another thread.

    Raises: RuntimeError: no loop was given, or this is its own thread, where waiting for it would never end.
    """
    try:
        running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if loop is None or running is loop:
        work.close()
        raise RuntimeError("a sync call on the engine's own event loop would wait for itself; use ainvoke or astream")
    return asyncio.run_coroutine_threadsafe(work, loop)


def _drive(stream: AsyncIterator[T], loop: asyncio.AbstractEventLoop | None) -> Iterator[T]:
    """Iterate an async generator of the engine's loop from another thread; leaving early closes it."""
    iterator: Any = stream
    try:
        while True:
            try:
                yield _submit(_next(iterator), loop).result()
            except StopAsyncIteration:
                return
    finally:
        _submit(iterator.aclose(), loop).result()


async def _next(iterator: AsyncIterator[T]) -> T:
    return await anext(iterator)
