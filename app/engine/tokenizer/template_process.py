"""The process in which chat templates run: a template is a program of the model's makers, and only a process can be
stopped in the middle of any of its operations.

Reads a `TemplateSource` and then conversations on standard input, and answers each on standard output, as frames: four
bytes of length, then msgpack.  Bounds its own memory and the processor time of each answer; the system ends a process
that exceeds the latter.  Imports neither transformers nor the rest of the service.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, BinaryIO

import msgspec
from jinja2 import Template, TemplateError, meta, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LENGTH_BYTES = 4
MARKS = ("\U000f0000", "\U000f0001")
"""What transformers puts around the control tokens that a message spells, so that they are encoded as text."""
_OPTIONAL = frozenset(["defined", "undefined", "default", "d"])
"""Tests and filters by which a template asks whether it has got a variable."""
MAX_MESSAGE_CHARS = 200
"""Of what the compiler says, which quotes the template, and of what the template says."""


class TemplateSource(msgspec.Struct, frozen=True):
    """The first frame: what to compile, and the limits of each rendering."""

    template: str
    variables: dict[str, str]
    """The names of the tokenizer's special tokens, for every rendering."""
    cpu_seconds: float
    memory_bytes: int
    """Of the whole process, with the interpreter."""


class Conversation(msgspec.Struct, frozen=True):
    """Every further frame: the variables of one rendering, and the most characters that it may have."""

    variables: dict[str, Any]
    max_chars: int


class Rendered(msgspec.Struct, frozen=True):
    """The answer to each frame; the first says whether the template compiles."""

    text: str = ""
    error: str | None = None
    """Why there is no text: the error's class, of a syntax error with its line and message."""
    said: str | None = None
    """With which words the template itself refuses, if they stand in it as they are and so quote no message."""
    exhausted: bool = False
    """Whether the memory or the characters did not suffice; nothing should be rendered here any more."""
    reads: tuple[str, ...] = ()
    """In the first answer: the names of the variables that the template reads without setting them itself."""


class _GenerationTag(Extension):
    """Renders the body of `{% generation %}`, which marks for training what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """The global `dict` of templates, without the attributes of the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """The global `namespace`, which stores no name that begins with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        first = dict(*args[1:])
        for name in (*first, *values):
            _check_name(name)
        Namespace.__init__(args[0], first, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("a namespace stores no name that begins with an underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON for a model to read; jinja2's own filter escapes it for HTML."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        for mark in MARKS:
            # Escaped, it would be a mark no longer, and the text behind it a control token.
            text = text.replace(json.dumps(mark)[1:-1], mark)
    return text


class _Refusal(TemplateError):
    """The template calls `raise_exception`."""


def _one_line(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text[:MAX_MESSAGE_CHARS])


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    # The date as the machine's owner reads it, which is what templates show a model.
    return datetime.now().strftime(form)  # noqa: DTZ005


def compile_template(source: str) -> tuple[Template, tuple[str, ...]]:
    """Compile a chat template in a sandbox with the filters and globals that transformers promises to templates.

    Returns: the template, and the names of the variables that it reads without setting them itself.
    Raises: TemplateSyntaxError; anything else that evaluating its constants may raise.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source), tuple(sorted(_read_variables(environment.parse(source))))


def _read_variables(template: nodes.Template) -> set[str]:
    """Return the variables that a template expects, and those for which it has a value only where there is none.

    jinja2 counts among the undeclared ones those that the template sets in one of its branches.
    """
    assigned = {name.name for name in template.find_all(nodes.Name) if name.ctx == "store"}
    optional = {
        node.node.name
        for node in (*template.find_all(nodes.Test), *template.find_all(nodes.Filter))
        if node.name in _OPTIONAL and isinstance(node.node, nodes.Name)
    }
    return meta.find_undeclared_variables(template) - (assigned - optional)


def read_frame(read: Callable[[int], bytes]) -> bytes | None:
    """Read a frame with `read`, which returns exactly the bytes asked for, or fewer at the end; None is the end."""
    header = read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    length = int.from_bytes(header, "little")
    body = read(length)
    return body if len(body) == length else None


def frame(message: msgspec.Struct) -> bytes:
    """Return a message as a frame.

    Raises: UnicodeEncodeError: a text is not valid Unicode; TypeError: a value has no form in msgpack.
    """
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def _render(template: Template, start: TemplateSource, conversation: Conversation) -> Rendered:
    try:
        text = template.render(**(start.variables | conversation.variables))
        text.encode()  # a template may cut a text so that it is not valid Unicode any more
    except _Refusal as refusal:
        said = (refusal.message or "").strip()
        return Rendered(error=TemplateError.__name__, said=_one_line(said) if said in start.template else None)
    except Exception as error:  # noqa: BLE001  # a template may raise anything
        return _failed(error)
    if len(text) > conversation.max_chars:
        return Rendered(error="more text than the service takes", exhausted=True)
    return Rendered(text=text)


def _failed(error: Exception) -> Rendered:
    if isinstance(error, MemoryError):
        return Rendered(error="more memory than the service gives", exhausted=True)
    if isinstance(error, TemplateSyntaxError):
        return Rendered(error=f"line {error.lineno}: {_one_line(error.message or '')}")
    return Rendered(error=type(error).__name__)


@contextlib.contextmanager
def _bounded_cpu(seconds: float) -> Iterator[None]:
    """Let the system end this process when it computes for longer; only the kernel can interrupt a C function."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _bound_memory(size: int) -> None:
    # Not every system has this limit; the one on text holds everywhere.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Compile the template and render conversations until the input ends."""

    def answer(rendered: Rendered) -> None:
        sink.write(frame(rendered))
        sink.flush()

    first = read_frame(source.read)
    if first is None:
        return
    start = msgspec.msgpack.decode(first, type=TemplateSource)
    _bound_memory(start.memory_bytes)
    decode = msgspec.msgpack.Decoder(Conversation).decode
    try:
        with _bounded_cpu(start.cpu_seconds):
            template, reads = compile_template(start.template)
    except Exception as error:  # noqa: BLE001  # constants are evaluated, which may raise anything
        answer(_failed(error))
        return
    answer(Rendered(reads=reads))
    while (body := read_frame(source.read)) is not None:
        with _bounded_cpu(start.cpu_seconds):
            rendered = _render(template, start, decode(body))
        answer(rendered)


def main() -> None:
    """Serve one template until the parent closes its end."""
    # What a template prints, or a library warns of, must not mix with the frames.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
