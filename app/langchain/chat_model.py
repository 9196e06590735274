"""LangChain's face of an engine for conversations: a ChatHuggingFace over an `EnginePipeline`."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from typing import Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_huggingface import ChatHuggingFace
from pydantic import SecretStr

from app.events import Event
from app.langchain.construction import ClosesEngine
from app.langchain.engine_loop import drive, run
from app.langchain.engine_thread import ThreadedEngine
from app.langchain.messages import (
    EventMessageChunk,
    chat_generation_chunk,
    from_langchain,
)
from app.langchain.pipeline import EnginePipeline, is_observed
from app.langchain.structured_output import structured_output
from app.langchain.tools import split_chat_arguments
from app.requests import GenerationRequest


class EngineChat(ClosesEngine, ChatHuggingFace):
    """A ChatHuggingFace over an EnginePipeline: the model's own chat template, applied to tokens, never to text."""

    cache: Any = False
    """As for `EnginePipeline`."""

    def _resolve_model_id(self) -> None:
        # The inherited method would load a second tokenizer (and torch with it) into this process.
        self.model_id = self.llm.model_id

    @classmethod
    def from_service(cls, base_url: str, key: str | SecretStr | None = None, **arguments: Any) -> Self:
        """Return a chat model that generates through a running service; the arguments are `EnginePipeline`'s."""
        return cls(llm=EnginePipeline.from_service(base_url, key, **arguments))

    @classmethod
    def from_model_id(  # type: ignore[override]  # as of the pipeline
        cls, model_id: str | None = None, task: str = "text-generation", backend: str = "default", **arguments: Any
    ) -> Self:
        """Return a chat model that is loaded for this program; the arguments are `EnginePipeline`'s."""
        return cls(llm=EnginePipeline.from_model_id(model_id, task, backend, **arguments))

    @property
    def _llm_type(self) -> str:
        return "engine_chat"

    def _owned_engine(self) -> ThreadedEngine | None:
        return self.llm._owned_engine() if isinstance(self.llm, EnginePipeline) else None

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
        yield from drive(self._astream(messages, stop, **kwargs), self.llm.loop)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        stream: bool | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        result: ChatResult = run(self._agenerate(messages, stop, **kwargs), self.llm.loop)
        return result
