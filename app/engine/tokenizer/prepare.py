"""Encodes the prompt of a request: a short one on the event loop, any other in a thread of the model's own.

Decides how long that may take.  A thread cannot be stopped; one that a text holds is left behind, and the other threads
go on.
"""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

from app.engine.base import PreparedPrompt, Tokenizer
from app.errors import DeadlineExceeded, InvalidRequest
from app.requests import GenerationRequest

THREADS = 4

_Job = tuple["Future[Any]", Callable[[], Any]]
_Jobs = SimpleQueue[_Job | None]


class PromptTokenizer(Tokenizer, Protocol):
    """A tokenizer whose work may be given to threads."""

    @property
    def inline_chars(self) -> int:
        """A shorter text takes less time to encode than to hand to a thread."""

    def close(self) -> None:
        """Free what encoding needs; decoding goes on."""


class PromptEncoder:
    """Encodes prompts for one model; its threads hold up no other model, nor the end of the process."""

    def __init__(self, tokenizer: PromptTokenizer, *, vocab_size: int, seconds: float) -> None:
        """Args:
        vocab_size: tokens that the model has; its tokenizer may know more.
        seconds: how long a request waits for its prompt to be encoded.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._jobs: _Jobs = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.close = weakref.finalize(self, _end_threads, self._jobs, self._threads)
        """Lets the threads end once they have nothing to do."""

    async def encode(self, request: GenerationRequest) -> PreparedPrompt:
        """Return the token ids of a request's prompt, encoded at most once.

        Raises: InvalidRequest: the chat template or the tokenizer refuses the prompt, or the model lacks a token of it.
            DeadlineExceeded: it takes too long.
        """
        ids = request.prompt_ids
        if ids is None and request.is_chat:
            ids = await self._in_thread(
                partial(
                    self._tokenizer.encode_chat,
                    request.messages,
                    continue_final_message=request.continue_final_message,
                    tenant=request.tenant,
                )
            )
        elif ids is None:
            encode = partial(self._tokenizer.encode_text, request.text or "")
            inline = len(request.text or "") < self._tokenizer.inline_chars
            ids = encode() if inline else await self._in_thread(encode)
        if max(ids, default=0) >= self._vocab_size:
            raise InvalidRequest("The model has no token for a part of this text, though its tokenizer does.")
        return PreparedPrompt(prompt_tokens=len(ids), prompt_ids=ids)

    async def _in_thread(self, encode: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        job: Future[tuple[int, ...]] = Future()
        self._jobs.put((job, encode))
        if len(self._threads) < THREADS and self._jobs.qsize():
            thread = threading.Thread(target=_work, args=[self._jobs], name="prompt encoder", daemon=True)
            self._threads.append(thread)
            thread.start()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), self._seconds)
        except TimeoutError:
            raise DeadlineExceeded("The prompt took too long to encode.") from None


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


def _end_threads(jobs: _Jobs, threads: list[threading.Thread]) -> None:
    for _ in threads:
        jobs.put(None)
