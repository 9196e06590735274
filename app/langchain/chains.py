"""The chains that the service runs: prompt templates piped into the models of `models.py`.

User text is only ever a message or the value of a variable, never part of a template.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.prompts.base import BasePromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableSequence, ensure_config, patch_config
from langchain_core.runnables.config import get_async_callback_manager_for_config, var_child_runnable_config
from msgspec import structs

from app.engine.base import Engine
from app.events import Event
from app.langchain.messages import from_langchain, to_langchain
from app.langchain.models import EngineChat, EnginePipeline
from app.langchain.pipeline import is_observed
from app.requests import GenerationRequest
from app.types import Role

SYSTEM_VARIABLES = ("model_name",)
COMPLETION_VARIABLES = ("model_name", "prompt")
"""Variables that the templates in prompts/ may use."""


class EngineSequence(RunnableSequence[Any, Any]):
    """`prompt | model` whose stream, when closed, closes the model's at once.

    LangChain's own sequence runs each step of a stream in a task and leaves an abandoned one to the garbage collector.
    """

    async def astream(
        self,
        input: Any,  # noqa: A002  # LangChain's own name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        """Yield the model's chunks; callbacks see the run of the chain and, below it, those of prompt and model."""
        config = ensure_config(config)
        manager = get_async_callback_manager_for_config(config)
        run = await manager.on_chain_start(None, input, name=config.get("run_name") or self.get_name())
        child = patch_config(config, callbacks=run.get_child())
        try:
            value = await self.first.ainvoke(input, child)
            async with aclosing(self._model(value, child, kwargs)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end({})

    def unobserved(self, variables: dict[str, Any], request: GenerationRequest) -> AsyncGenerator[Any, None]:
        """Return the same stream for a run that nobody listens to."""
        prompt: Any = self.first
        model: Any = self.last
        chunks: AsyncGenerator[Any, None] = model.astream_unobserved(prompt.format_prompt(**variables), request=request)
        return chunks

    def _model(self, value: Any, config: RunnableConfig, kwargs: dict[str, Any]) -> AsyncGenerator[Any, None]:
        stream: Any = self.last.astream(value, config, **kwargs)
        generator: AsyncGenerator[Any, None] = stream
        return generator


class ModelChains:
    """The chains of one model: `ChatPromptTemplate | EngineChat` and `PromptTemplate | EnginePipeline`."""

    def __init__(self, engine: Engine, model: str, *, system: str, completion: str = "{prompt}") -> None:
        """Args:
        system, completion: templates; `SYSTEM_VARIABLES` and `COMPLETION_VARIABLES` name what they know.  An empty
            `system` is none.
        """
        pipeline = EnginePipeline(engine=engine, model_id=model)
        chat = EngineChat(llm=pipeline)
        conversation = MessagesPlaceholder("conversation")
        known = {"model_name": model}
        before = [("system", system)] if system else []
        prompt = ChatPromptTemplate.from_messages([*before, conversation]).partial(**known)
        self._completion_prompt = PromptTemplate.from_template(completion).partial(**known)
        self._completion_is_plain = completion == "{prompt}"
        self._completion = _pipe(self._completion_prompt, pipeline)
        self._chat = _pipe(prompt, chat)
        self._chat_with_own_system = _pipe(ChatPromptTemplate.from_messages([conversation]), chat)
        # A tracer or debug output is switched on when the process starts.
        self._observed = is_observed({})
        self._system = tuple(map(from_langchain, prompt.format_messages(conversation=[])))

    def render(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with its prompt as the templates write it."""
        if request.prompt_ids is not None:
            return request
        if not request.is_chat:
            if self._completion_is_plain:
                return request
            return structs.replace(request, text=self._completion_prompt.format(prompt=request.text))
        if self._choose_chat(request) is self._chat:
            return structs.replace(request, messages=(*self._system, *request.messages))
        return request

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Run the chain of the request's kind and yield the events that its chunks carry."""
        if request.is_chat:
            chain = self._choose_chat(request)
            variables: dict[str, Any] = {"conversation": [to_langchain(message) for message in request.messages]}
        else:
            chain, variables = self._completion, {"prompt": request.text}
        # A configuration in the context means that this runs within somebody's chain.
        observed = self._observed or var_child_runnable_config.get() is not None
        stream: Any = chain.astream(variables, request=request) if observed else chain.unobserved(variables, request)
        async with aclosing(stream):
            async for chunk in stream:
                yield chunk.event

    def _choose_chat(self, request: GenerationRequest) -> EngineSequence:
        """Return the chain of a chat; the template's system text is for one that brings none, not even an empty one."""
        brings_own = any(message.role is Role.SYSTEM for message in request.messages)
        return self._chat_with_own_system if brings_own else self._chat


def _pipe(prompt: BasePromptTemplate[Any], model: Any) -> EngineSequence:
    return EngineSequence(first=prompt, last=model)
