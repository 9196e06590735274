"""Encodes the prompt of a request: a short one on the event loop, any other in a thread of the model's own.

Decides how long that may take, and whose prompt is next: tenants take turns.  A thread cannot be stopped; one that a
text holds is left behind, and the other threads go on.
"""

import asyncio
import contextlib
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, Protocol, TypeVar

from app.embeddings import EmbeddingRequest, EncodedInputs
from app.engine.base import EngineInfo, PreparedPrompt, Tokenizer
from app.engine.tokenizer.chat_traits import ChatTraits
from app.engine.tokenizer.token_length import TokenLength, TooManyTokensError
from app.errors import DeadlineExceeded, InvalidRequest
from app.requests import GenerationRequest
from app.types import Tenant

THREADS = 4

_Encoded = TypeVar("_Encoded")
_Job = tuple["Future[Any]", Callable[[], Any]]


class _Jobs:
    """Prompts that wait for a thread: each tenant's in their order, a prompt of each tenant in turn."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[Tenant, deque[_Job]] = OrderedDict()
        """Those that have a prompt here, the one whose turn is next first."""
        self._changed = threading.Condition()
        self._closed = False

    @property
    def empty(self) -> bool:
        return not self._tenants

    def put(self, tenant: Tenant, job: _Job) -> None:
        with self._changed:
            self._tenants.setdefault(tenant, deque()).append(job)
            self._changed.notify()

    def get(self) -> _Job | None:
        """Wait for a prompt and take it; None: there are none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._tenants or self._closed)
            if not self._tenants:
                return None
            tenant, waiting = self._tenants.popitem(last=False)
            job = waiting.popleft()
            if waiting:
                self._tenants[tenant] = waiting
            return job

    def close(self) -> None:
        """Let the threads end once they have nothing to do."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class PromptTokenizer(Tokenizer, Protocol):
    """A tokenizer whose work may be given to threads."""

    @property
    def inline_chars(self) -> int:
        """A shorter text takes less time to encode than to hand to a thread."""

    @property
    def length(self) -> TokenLength:
        """Tells which texts are too long for the model before they are encoded."""

    def close(self) -> None:
        """Free what encoding needs; decoding goes on."""


class ModelTokenizer(PromptTokenizer, Protocol):
    """A tokenizer from a model's files, which know what its chats look like."""

    @property
    def traits(self) -> ChatTraits:
        """What the files say about chats."""

    @property
    def template_bytes(self) -> int:
        """Length of the chat template, whose every text of its own is written once, or around each message."""

    @property
    def template_variables(self) -> tuple[str, ...]:
        """Names of the variables that a request may set in the chat template, sorted."""

    @property
    def renders_reasoning(self) -> bool:
        """Whether the chat template shows what the assistant thought in earlier turns."""


class EncodingThreads:
    """Threads that encode for one model; they hold up no other model, nor the end of the process."""

    def __init__(self, seconds: float) -> None:
        """Args: seconds: how long a request waits for its prompt to be encoded."""
        self._seconds = seconds
        self._jobs = _Jobs()
        self._threads: list[threading.Thread] = []
        self.close = weakref.finalize(self, self._jobs.close)
        """Lets the threads end once they have nothing to do."""

    async def in_thread(self, tenant: Tenant, encode: Callable[[], _Encoded]) -> _Encoded:
        """Return what a function returns that encodes for a tenant.

        Raises: DeadlineExceeded: it takes too long.  Whatever it raises.
        """
        job: Future[_Encoded] = Future()
        self._jobs.put(tenant, (job, encode))
        if len(self._threads) < THREADS and not self._jobs.empty:
            thread = threading.Thread(target=_work, args=[self._jobs], name="prompt encoder", daemon=True)
            self._threads.append(thread)
            thread.start()
        try:
            # Not `wait_for`, which before Python 3.12 forgets a cancellation that comes with the result.
            async with asyncio.timeout(self._seconds):
                return await asyncio.wrap_future(job)
        except TimeoutError:
            raise DeadlineExceeded("The prompt took too long to encode.") from None


class PromptEncoder(EncodingThreads):
    """Encodes prompts for one model."""

    def __init__(self, tokenizer: PromptTokenizer, *, vocab_size: int, seconds: float) -> None:
        """Args:
        vocab_size: tokens that the model has; its tokenizer may know more.
        seconds: how long a request waits for its prompt to be encoded.
        """
        super().__init__(seconds)
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    async def encode_inputs(self, request: EmbeddingRequest, info: EngineInfo) -> EncodedInputs:
        """Return the texts of a request to embed, each encoded as a raw prompt.

        Raises: InvalidRequest: the tokenizer refuses one, or the model has no such prompt.  DeadlineExceeded.
        """
        most = request.most_tokens(info.embedding)
        if info.embedding is not None:
            info.embedding.prompt(request.prompt_name, request.input_type)

        def encode() -> EncodedInputs:
            ids = (self._tokenizer.encode_text(each) if isinstance(each, str) else each for each in request.inputs)
            return EncodedInputs(token_ids=tuple(each[:most] for each in ids))

        return await self.in_thread(request.tenant, encode)

    async def encode(self, request: GenerationRequest) -> PreparedPrompt:
        """Return the token ids of a request's prompt, encoded at most once; of one that is far too long only a bound.

        Raises: InvalidRequest: the chat template or the tokenizer refuses the prompt, or the model lacks a token of it.
            DeadlineExceeded: it takes too long.
        """
        try:
            ids = await self._ids(request)
        except TooManyTokensError as error:
            return PreparedPrompt(error.least_tokens, None, is_lower_bound=True)
        if max(ids, default=0) >= self._vocab_size:
            raise InvalidRequest("The model has no token for a part of this text, though its tokenizer does.")
        return PreparedPrompt(prompt_tokens=len(ids), prompt_ids=ids)

    async def _ids(self, request: GenerationRequest) -> tuple[int, ...]:
        ids = request.prompt_ids
        if ids is None and request.is_chat:
            ids = await self.in_thread(
                request.tenant,
                partial(
                    self._tokenizer.encode_chat,
                    request.messages,
                    tools=request.tools,
                    template_kwargs=request.template_kwargs,
                    continue_final_message=request.continue_final_message,
                    tenant=request.tenant,
                ),
            )
        elif ids is None:
            text = request.text or ""
            if request.truncate_prompt is None:
                self._tokenizer.length.check(text)
            else:
                text = self._tokenizer.length.end(text)
            encode = partial(self._tokenizer.encode_text, text)
            inline = len(text) < self._tokenizer.inline_chars
            ids = encode() if inline else await self.in_thread(request.tenant, encode)
        return ids


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        future, encode = job
        if not future.set_running_or_notify_cancel():
            continue
        # The loop that waits may have gone by now.
        with contextlib.suppress(InvalidStateError, RuntimeError):
            try:
                future.set_result(encode())
            except BaseException as error:  # noqa: BLE001  # it belongs to the request
                future.set_exception(error)
