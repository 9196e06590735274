"""A model's chat template, rendered in processes of its own: whatever it does, it takes a bounded time and memory.

Decides how many such processes a model has, when one is replaced, and what counts as too much.  Text in, text out.
"""

import logging
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import TemplateError

import app
from app.engine.tokenizer.template_process import Conversation, Rendered, TemplateSource, frame, read_frame

log = logging.getLogger(__name__)

PROCESSES = 2
"""While one of a model's conversations is stopped, the others go on."""
CPU_SECONDS = 2.0
"""Processor time of one rendering; a real one takes a thousandth of it."""
ANSWER_SECONDS = 20.0
"""Wall time of one rendering, for a process that does not get to compute."""
MEMORY_BYTES = 512 * 1024**2
MIN_CHARS = 1_000_000
CHARS_PER_CHAR = 16
"""A rendering may have so many characters for each of its conversation, and `MIN_CHARS` at least."""
INHERITED_VARIABLES = ("TZ", "LANG", "LC_ALL", "LC_TIME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV")
"""Environment variables on which the date in a template and the interpreter itself may depend."""
CONTINUE_MARK = "\uf8fe\uf8ff\uf8fe"
"""Stands behind a message that is to be continued, with a space, so that the rendering can be cut there."""


class TemplateRefusedError(Exception):
    """The template does not take this conversation; the message is a class of error, or our own words."""

    def __init__(self, reason: str, said: str | None = None) -> None:
        super().__init__(reason)
        self.said = said
        """The template's own words, if they are known to quote no message."""

    @property
    def deliberate(self) -> bool:
        """Whether the template itself says so, rather than to fail in some operation."""
        return str(self) == TemplateError.__name__


class TemplateExhaustedError(Exception):
    """The template needs more time, memory or text than a conversation may take."""


class ChatTemplate:
    """Renders conversations; safe to use from several threads.

    Its processes end with `close`, with the last reference to it, and with this process.
    """

    def __init__(self, template: str, variables: Mapping[str, str], *, cpu_seconds: float = CPU_SECONDS) -> None:
        """Compile the template.  Args: variables: the names of special tokens that it may write.

        Raises: ValueError: it cannot be compiled; the message is one line.
        """
        self._source = TemplateSource(template, dict(variables), cpu_seconds, MEMORY_BYTES)
        self._places = threading.BoundedSemaphore(PROCESSES)
        self._idle: deque[_Process] = deque()
        self.close = weakref.finalize(self, _close_all, self._idle)
        """Ends the processes that are not rendering; those that are end with their rendering."""
        try:
            first = _Process(self._source)
        except (TemplateRefusedError, TemplateExhaustedError) as error:
            raise ValueError(f"chat_template: {error}") from None
        self._idle.append(first)
        self.reads = first.reads
        """Names of the variables that the template reads without setting them itself."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation, ending where the assistant begins, or where the last message breaks off.

        Args:
            tools: what the assistant may call, in OpenAI's form.
            variables: others that the template reads; none of them can take the place of the conversation.
        Raises: TemplateRefusedError, TemplateExhaustedError; UnicodeEncodeError: a message is not valid Unicode.
        """
        shown = [dict(message) for message in messages]
        if continue_final_message:
            shown[-1]["content"] = _with_mark(shown[-1]["content"])
        values = {
            "messages": shown,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": not continue_final_message,
        }
        length = _text_chars([messages, tools or ()])
        text = self._rendered(Conversation(variables | values, max(MIN_CHARS, CHARS_PER_CHAR * length)))
        return _cut(text, _text(messages[-1]["content"])) if continue_final_message else text

    def _rendered(self, conversation: Conversation) -> str:
        request = frame(conversation)
        with self._places:
            try:
                process = self._idle.pop()
            except IndexError:
                process = _Process(self._source)
            try:
                return process.render(request)
            finally:
                if process.usable and self.close.alive:
                    self._idle.append(process)
                else:
                    process.close()


class _Process:
    """One process that has compiled the template."""

    def __init__(self, source: TemplateSource) -> None:
        """Start it.  Raises: TemplateRefusedError, TemplateExhaustedError: the template cannot be compiled."""
        self.usable = True
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "app.engine.tokenizer.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=_environment(),
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101, PT018
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        # A process that does not read must not hold the thread that writes to it.
        os.set_blocking(self._stdin.fileno(), False)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(self._stdout, select.POLLIN)
        self._writable.register(self._stdin, select.POLLOUT)
        try:
            self.reads = self._exchange(frame(source)).reads
        except BaseException:
            self.close()
            raise

    def render(self, request: bytes) -> str:
        """Send a frame and return the text of the answer.

        Raises: TemplateRefusedError; TemplateExhaustedError: and the process is not usable any more.
        """
        return self._exchange(request).text

    def _exchange(self, request: bytes) -> Rendered:
        deadline = time.monotonic() + ANSWER_SECONDS
        self.usable = False
        try:
            self._write(request, deadline)
            body = read_frame(lambda count: self._read(count, deadline))
        except BrokenPipeError:
            body = None
        if body is None:
            log.warning("the chat template was stopped: it took too long, or its process ended")
            raise TemplateExhaustedError("it takes too much time")
        answer = msgspec.msgpack.decode(body, type=Rendered)
        if answer.exhausted:
            log.warning("the chat template was stopped: it took %s", answer.error)
            raise TemplateExhaustedError(f"it takes {answer.error}")
        self.usable = True
        if answer.error is not None:
            raise TemplateRefusedError(answer.error, answer.said)
        return answer

    def close(self) -> None:
        """Kill the process and wait for that."""
        self.usable = False
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()

    def _write(self, request: bytes, deadline: float) -> None:
        """Write all of it, or less where the time ends; the process then has nothing to answer."""
        left = memoryview(request)
        while left and _is_ready(self._writable, deadline):
            left = left[os.write(self._stdin.fileno(), left) :]

    def _read(self, count: int, deadline: float) -> bytes:
        """Return so many bytes of output, or fewer where it ends or the time does."""
        parts: list[bytes] = []
        while count:
            if not _is_ready(self._readable, deadline):
                break
            part = os.read(self._stdout.fileno(), count)
            if not part:
                break
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def _is_ready(descriptor: select.poll, deadline: float) -> bool:
    """Wait until a descriptor is ready; return False when the time is over first."""
    left = deadline - time.monotonic()
    return left > 0 and bool(descriptor.poll(left * 1000))


def _environment() -> dict[str, str]:
    """Return what an interpreter needs; a template that got out of its sandbox would find no secret of the service."""
    inherited = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
    return inherited | {"PYTHONPATH": str(Path(next(iter(app.__path__))).parent), "PATH": os.defpath}


def _close_all(idle: "deque[_Process]") -> None:
    while idle:
        idle.pop().close()


def _text(content: Any) -> str:
    """Return the text of a message, or of its last part that has any, which is the one to continue."""
    if isinstance(content, str):
        return content
    return next((str(part["text"]) for part in reversed(content) if "text" in part), "")


def _with_mark(content: Any) -> Any:
    """Return a content that ends in the mark and a space."""
    if isinstance(content, str):
        return f"{content}{CONTINUE_MARK} "
    last = max((place for place, part in enumerate(content) if "text" in part), default=-1)
    return [{**part, "text": _with_mark(part["text"])} if place == last else part for place, part in enumerate(content)]


def _text_chars(value: Any) -> int:
    """Return how many characters of text a message holds, at any depth."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_text_chars, value.values()))
    return sum(map(_text_chars, value)) if isinstance(value, list | tuple) else 0


def _cut(text: str, content: str) -> str:
    """Cut a rendering behind the message that is to be continued.

    Raises: TemplateRefusedError: the template does not write the message as it is.
    """
    end = text.rfind(CONTINUE_MARK)
    if end < 0 or content.strip() not in text[:end]:
        raise TemplateRefusedError("it does not show the message to continue")
    # A template that trims messages has taken away the space, and would the message's own.
    trimmed = not text.startswith(" ", end + len(CONTINUE_MARK))
    return text[:end].rstrip() if trimmed else text[:end]
