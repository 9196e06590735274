"""LangChain's face of an engine for texts: a HuggingFacePipeline that generates through `Engine`.

It is what its name says (isinstance holds) and works in anyone's chain, sync and async, whole and streamed, with usage,
finish reason and log-probabilities in LangChain's own places.  Closing its stream closes the engine's.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, nullcontext
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.globals import get_debug, get_verbose
from langchain_core.language_models import LanguageModelInput
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_huggingface import HuggingFacePipeline
from langsmith.utils import tracing_is_enabled
from msgspec import structs
from pydantic import ConfigDict, Field, SecretStr

from app.events import Event
from app.langchain.construction import ClosesEngine, model_fields, service_fields
from app.langchain.engine_loop import drive, run
from app.langchain.engine_thread import Generator, ThreadedEngine
from app.langchain.loading import sampling_arguments
from app.langchain.messages import (
    EventGenerationChunk,
    EventText,
)
from app.requests import RESOLVABLE, GenerationRequest
from app.types import SamplingParams, Tenant


def is_observed(config: RunnableConfig) -> bool:
    """Return whether anybody listens to the runs under this configuration: callbacks, a tracer, debug output."""
    return bool(config.get("callbacks")) or get_debug() or get_verbose() or bool(tracing_is_enabled())


class EnginePipeline(ClosesEngine, HuggingFacePipeline):
    """A HuggingFacePipeline whose model runs behind `Engine`: cancellable, with stop strings, usage and errors.

    Example: `llm.invoke("Once upon a time", max_tokens=40, temperature=0, stop=["The end"])`
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    engine: Any
    """The `Engine`; typed loosely because pydantic cannot check a Protocol without running its properties."""
    loop: asyncio.AbstractEventLoop | None = None
    """The event loop of the engine; the sync methods hand their work to it and raise where it is None."""
    defaults: SamplingParams = SamplingParams(max_tokens=256)
    arguments: Mapping[str, Any] = Field(default_factory=dict)
    """Sampling parameters of every call, by the names that a call takes; those of a call have precedence."""
    cache: Any = False
    """LangChain's own cache leaves the arguments of a call out of its key, so not even a global one is used."""

    @classmethod
    def from_service(
        cls,
        base_url: str,
        key: str | SecretStr | None = None,
        *,
        model: str | None = None,
        model_id: str | None = None,
        timeout_seconds: float = 600,
        **arguments: Any,
    ) -> Self:
        """Return a pipeline that generates through a running service, sync and async.

        Args:
            base_url: of the service, with or without `/v1`.
            key: the API key.
            model, model_id: two names of one argument: the model there, by default the first that the service lists.
            timeout_seconds: longest silence of the service.
            arguments: sampling parameters of every call; what is left open follows the service's own defaults.
        Raises:
            ValueError: an argument that nothing would honour.
            AppError: no service answers, it refuses the key, or it has no such model.
        """
        return cls(
            **service_fields(
                base_url, key, model=model, model_id=model_id, timeout_seconds=timeout_seconds, others=arguments
            )
        )

    @classmethod
    def from_model_id(  # type: ignore[override]  # the inherited method loads with transformers, which takes more
        cls,
        model_id: str | None = None,
        task: str = "text-generation",
        backend: str = "default",
        device: str | None = None,
        device_map: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        pipeline_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
        *,
        model: str | None = None,
        filters: bool = False,
        token: str | SecretStr | None = None,
        **arguments: Any,
    ) -> Self:
        """Return a pipeline whose model is loaded for this program, in a process of its own; works sync and async.

        Args:
            model_id, model: two names of one argument: a folder, or an id of the Hugging Face hub.
            device: auto, cpu, cuda or mps.
            model_kwargs: settings as in `arguments`.
            pipeline_kwargs: sampling parameters of every call.
            batch_size: most sequences decoded together; by default what fits in memory, 32 at most, on a GPU 128.
            filters: whether personal data is masked in prompts and completions; it is not by default.
            token: for gated models of the hub; by default HF_TOKEN.
            arguments: sampling parameters of every call, and settings of the section `model` of the configuration.
        Raises:
            ValueError: an argument that nothing would honour.
            EngineFailed: the model cannot be loaded.
        """
        return cls(
            **model_fields(
                model_id,
                task=task,
                backend=backend,
                device=device,
                device_map=device_map,
                model_kwargs=model_kwargs,
                pipeline_kwargs=pipeline_kwargs,
                batch_size=batch_size,
                model=model,
                filters=filters,
                token=token,
                others=arguments,
            )
        )

    @property
    def _llm_type(self) -> str:
        return "engine_pipeline"

    def _owned_engine(self) -> ThreadedEngine | None:
        return self.engine if isinstance(self.engine, ThreadedEngine) else None

    async def open(
        self, stop: list[str] | None, kwargs: Mapping[str, Any], **prompt: Any
    ) -> AbstractAsyncContextManager[AsyncGenerator[Event, None]]:
        """Return the engine's stream, to be entered; the one place where LangChain's side meets the engine's.

        Args:
            stop, kwargs: of a call: `request`, which the service binds, or sampling parameters by their names.
            prompt: `text` or `messages`; encoded unless the request brings its token ids.
        """
        engine: Generator = self.engine
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
        own = sampling_arguments({name: value for name, value in kwargs.items() if name != "streams"})
        if stop:
            own["stop"] = tuple(stop)
        given = {**sampling_arguments(self.arguments), **own}
        return GenerationRequest(
            id=f"chain-{uuid.uuid4().hex}",
            tenant=Tenant.program(),
            sampling=replace(self.defaults, **given),
            # A service has defaults of its own.
            unset=RESOLVABLE - given.keys(),
            **prompt,
        )

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
        for chunk in drive(self._astream(prompt, stop, **kwargs), self.loop):
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
        result: LLMResult = run(self._agenerate(prompts, stop, **kwargs), self.loop)
        return result
