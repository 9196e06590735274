"""The model's own tokenizer in the API process: conversations and prompts to tokens, tokens to text.

Only the chat template and the tokenizer itself may write a control token; text of a request never becomes one.  Imports
no torch, since the fast tokenizer needs none.
"""

import json
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import encode_marked_chat

from app.engine.tokenizer.chat_renderer import ChatRenderer
from app.engine.tokenizer.chat_traits import read_traits
from app.engine.tokenizer.control_marks import ControlMarks
from app.engine.tokenizer.segment_cache import SegmentEncoder, forget_words
from app.engine.tokenizer.stream_decoder import StreamDecoder
from app.engine.tokenizer.token_bytes import token_bytes_reader
from app.engine.tokenizer.token_length import TokenLength, longest_token_bytes
from app.errors import InvalidRequest
from app.requests import TemplateValue
from app.types import Message, Tenant, Tool

log = logging.getLogger(__name__)

INLINE_CHARS = 1000
"""A shorter text is encoded in less time than a thread takes to begin, by a tokenizer without slow expressions."""

_REPEATED_GROUP = re.compile(r"\)[*+{]|\\\d")
"""What an expression needs for the number of its attempts to explode: a repeated group, or a reference to one."""


class _ChatTokenizer(PreTrainedTokenizerFast):
    """Encodes what the chat template writes by segments."""

    segments: SegmentEncoder
    tenant: Tenant | None = None
    """Whose conversation is being encoded."""

    def encode(self, text: str, *others: Any, **settings: Any) -> list[int]:
        """Encode as the class above does; without special tokens around it, which is what templates ask for, faster."""
        if others or settings != {"add_special_tokens": False}:
            return list(super().encode(text, *others, **settings))
        return self.segments.encode(text, self.tenant)


class HfTokenizer:
    """A Hugging Face fast tokenizer, safe to use from several threads.

    transformers stores the flags of a call in the tokenizer itself, so that two calls at once read each other's: the
    copy for conversations stands behind a lock, and the copies for prompts and for segments and decoding never change a
    flag.
    """

    def __init__(self, folder: Path | str, *, context_length: int | None = None) -> None:
        """Load `tokenizer.json`, its configuration and the chat template, as `save_pretrained` wrote them.

        Args: context_length: the model's, in tokens; a prompt that surely has more is not encoded.
        Raises: OSError, ValueError: the folder holds no usable fast tokenizer, or its chat template cannot be used.
        """
        self._chat: _ChatTokenizer = _ChatTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = str(self._chat.backend_tokenizer.to_str())
        self._plain = FastTokenizer.from_str(backend)
        self._plain.no_truncation()
        self._plain.no_padding()
        self._chat_lock = threading.Lock()
        self.traits = read_traits(self._chat)
        default, with_tools = _template_of(self._chat, None), _template_of(self._chat, [])
        source = f"{default or ''}\0{with_tools or ''}"
        self.template_bytes = max(len((each or "").encode()) for each in (default, with_tools))
        control = _control_ids(self._chat, source)
        special = self._chat.special_tokens_map
        written = " ".join([source, *map(str, special.values())])
        self._chat.segments = SegmentEncoder(self._plain, self._chat.added_tokens_decoder.values(), written)
        marks = ControlMarks(_names(self._chat, control), _names(self._chat, control & _thought_marks(self._chat)))
        self._default = _renderer(default, special, marks)
        self._with_tools = self._default if with_tools == default else _renderer(with_tools, special, marks)
        self._text = _plain_text_copy(backend, control)
        described = json.loads(backend)
        self.inline_chars = 0 if any(map(_REPEATED_GROUP.search, _expressions(described))) else INLINE_CHARS
        self.length = TokenLength(longest_token_bytes(described), context_length)
        self._forbidden = control - {self._chat.unk_token_id}
        self._not_text = self._forbidden | _marks(self._chat, source)
        added = self._chat.added_tokens_decoder
        self._hidden = {token.content: number for number, token in added.items() if token.special}
        self._prefix = _prefix_ids(self._text)
        self._anchor = tuple(self._text.encode("a", add_special_tokens=False).ids)
        for tokenizer in (self._chat.backend_tokenizer, self._plain, self._text):
            forget_words(tokenizer)
        self._read_bytes = token_bytes_reader(self._plain, list(self._anchor))

    @property
    def template_variables(self) -> tuple[str, ...]:
        """Return the names of the variables that a request may set in the chat template, sorted."""
        return tuple(sorted({name for each in self._renderers for name in each.variables}))

    @property
    def renders_reasoning(self) -> bool:
        """Return whether the chat template shows what the assistant thought in earlier turns."""
        return any(each.form.reasoning for each in self._renderers)

    @property
    def _renderers(self) -> list[ChatRenderer]:
        return [each for each in (self._default, self._with_tools) if each is not None]

    def close(self) -> None:
        """End the processes that render the chat template."""
        for each in self._renderers:
            each.close()

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        template_kwargs: Sequence[tuple[str, TemplateValue]] = (),
        continue_final_message: bool = False,
        tenant: Tenant | None = None,
    ) -> tuple[int, ...]:
        """Apply the chat template, ending where the assistant begins to speak, or where the last message breaks off.

        A template without a system role gets the system text in front of the next user message, and one without a
        tool role gets tool results as the user's words; one that shows no tools gets them as a system text.

        Raises: InvalidRequest: the model has no chat template, or the template refuses these messages.
            TooManyTokensError: they are longer than the context window in any case.
        """
        renderer = self._with_tools if tools else self._default
        if renderer is None:
            missing = _missing_template(self._chat)
            raise InvalidRequest(f"{missing} Send a plain prompt to /v1/completions or /v1/generate, not messages.")
        text = renderer.render(
            messages, tools=tools, template_kwargs=template_kwargs, continue_final_message=continue_final_message
        )
        self.length.check(text)
        with _tokenizer_errors(), self._chat_lock:
            self._chat.tenant = tenant
            return tuple(encode_marked_chat(self._chat, text))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Encode a raw prompt with the tokens that the tokenizer puts in front of every text.

        Raises: InvalidRequest: the text is not valid Unicode, the tokenizer cannot encode it, or makes control tokens
            of plain text.
        """
        with _tokenizer_errors():
            # As a batch of one: a single text would be encoded with the interpreter's lock held.
            ids = self._text.encode_batch([text], add_special_tokens=False)[0].ids
        if not self._forbidden.isdisjoint(ids):
            raise InvalidRequest("The prompt holds a control token of the model that cannot be sent as text.")
        return (*self._prefix, *ids)

    def decoder(self, prompt_ids: Sequence[int] = ()) -> StreamDecoder:
        """Return a decoder for one completion of a prompt (special tokens are not shown)."""
        return StreamDecoder(self._plain, self._anchor, prompt_ids, self._read_bytes)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token in mid-text; of a control token its name, of an unknown id nothing."""
        return self._read_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """Return the same as text, where a part of a character is U+FFFD."""
        return self._read_bytes(token_id).decode(errors="replace")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of all these tokens, with the names of control tokens."""
        return str(self._plain.decode(list(token_ids), skip_special_tokens=False))

    def has_control_tokens(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt holds tokens that ordinary text has not, behind the tokenizer's own first ones."""
        start = len(self._prefix) if tuple(prompt_ids[: len(self._prefix)]) == self._prefix else 0
        return not self._not_text.isdisjoint(prompt_ids[start:])

    def hidden_token(self, name: str) -> int | None:
        """Return the special token of this name, which no completion shows; None where there is none."""
        return self._hidden.get(name)


@contextmanager
def _tokenizer_errors() -> Iterator[None]:
    """Raise what a tokenizer raises for one text as InvalidRequest: the same text would fail again."""
    try:
        yield
    except (TypeError, UnicodeEncodeError):  # what tokenizers raises for a lone surrogate
        raise InvalidRequest("The prompt is not valid Unicode text.") from None
    except ValueError:  # what transformers raises for a token that it cannot take apart
        raise InvalidRequest("The prompt holds a control token of the model that cannot be sent as text.") from None
    except BaseException as error:
        # tokenizers has no classes of its own: an unknown word is an Exception, and an expression that is given up for
        # its many attempts a panic, which is none.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        log.warning("the tokenizer cannot encode a text: %s", type(error).__name__)
        raise InvalidRequest("The model's tokenizer cannot encode this text.") from None


def _renderer(source: str | None, special_tokens: Mapping[str, str], marks: ControlMarks) -> ChatRenderer | None:
    return None if source is None else ChatRenderer(source, special_tokens, marks)


def _names(tokenizer: PreTrainedTokenizerFast, token_ids: Iterable[int]) -> list[str]:
    return [tokenizer.added_tokens_decoder[each].content for each in token_ids]


_THOUGHT = re.compile(r"think|thought|reason", re.IGNORECASE)


def _thought_marks(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the tokens around an assistant's reasoning: they are text of its messages, and begin no message."""
    return frozenset(
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if not token.special and _THOUGHT.search(token.content)
    )


def _template_of(tokenizer: PreTrainedTokenizerFast, tools: list[Any] | None) -> str | None:
    """Return the template of chats with tools or, for None, without, chosen among several as transformers does.

    None where there is none, or none of several is the one to take.
    """
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError:
        refused = "without" if tools is None else "with"
        log.warning("the model has several chat templates and no default one; chats %s tools are refused", refused)
        return None


def _missing_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return for the model's users why there is no template."""
    templates = tokenizer.chat_template
    if not templates:
        return "The files of this model hold no chat template."
    names = ", ".join(name for name in sorted(templates) if name.isprintable())[:200]
    return f"The files of this model hold no default chat template, only others ({names})."


def _control_ids(tokenizer: PreTrainedTokenizerFast, template: str) -> frozenset[int]:
    """Return the special tokens and those that the template writes, by transformers' own rule."""
    return frozenset(
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and not token.content.isspace())
    )


_MARK = re.compile(r"<[^<>\s]{1,64}>|\[[A-Z_/]{2,64}\]")
"""What looks like a mark in a chat template: `<|user|>`, `[INST]`."""


def _marks(tokenizer: PreTrainedTokenizerFast, template: str) -> frozenset[int]:
    """Return the tokens that a text hardly has: every added one but white space, and the marks of the template that the
    vocabulary has as tokens without saying that they are added."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    written = {vocabulary[mark] for mark in _MARK.findall(template) if mark in vocabulary}
    return frozenset(added | written) - {tokenizer.unk_token_id}


def _plain_text_copy(backend: str, control: frozenset[int]) -> FastTokenizer:
    """Copy a tokenizer so that it reads control tokens as text and neither pads nor truncates.

    `encode_special_tokens` spares only tokens marked special, and many models do not mark the tokens of their
    template; so the marks are set first.
    """
    spec: dict[str, Any] = json.loads(backend)
    for token in spec["added_tokens"]:
        token["special"] = token["id"] in control
    spec["truncation"] = spec["padding"] = None
    copy = FastTokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    return copy


def _expressions(spec: Any) -> Iterator[str]:
    """Yield the regular expressions in a tokenizer's description, wherever they stand."""
    if isinstance(spec, dict):
        if isinstance(expression := spec.get("Regex"), str):
            yield expression
        for key, value in spec.items():
            if key != "model":  # its vocabulary is large, and holds none
                yield from _expressions(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _expressions(value)


def _prefix_ids(tokenizer: FastTokenizer) -> tuple[int, ...]:
    """Return the special tokens that the tokenizer adds before a text; those after it would end the prompt."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])
