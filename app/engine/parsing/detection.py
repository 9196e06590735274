"""Decides at load how a model writes calls and reasoning, from its chat template and its tokens.

A tokenizer's own description of its answers (transformers' `response_template`) is read first: it names the marks.
Templates are recognised by the marks that they write themselves, since a family's models share them.
"""

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

from app.config import ModelConfig
from app.engine.base import ChatFormat
from app.engine.parsing.formats import HARMONY, marks_of
from app.engine.tokenizer.chat_traits import ChatTraits

log = logging.getLogger(__name__)

DESCRIBED = "described"
"""The format of what no parser here knows, and the tokenizer describes."""
DEFAULT_TOOL_FORMAT = "hermes"
"""Of a template that shows no tools: the system text that lists them asks for this form."""

_TOOL_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (HARMONY, ("<|channel|>", "<|message|>")),
    ("deepseek", ("<｜tool▁sep｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁sep｜>",)),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("gemma4", ("<|tool_call>",)),
    ("function_gemma", ("<start_function_call>",)),
    ("qwen_xml", ("<tool_call>", "<function=")),
    ("hermes", ("<tool_call>",)),
    ("phi", ("<|tool_call|>",)),
    ("phi", ("<|tool|>",)),
    ("llama", ("<|python_tag|>",)),
    ("llama", ("<|start_header_id|>", '"parameters": ')),
)
"""The formats of calls and what all of a template's signs are; the first whose signs are all there."""
_REASONING_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (HARMONY, ("<|channel|>", "<|message|>")),
    ("mistral", ("[THINK]",)),
    ("gemma4", ("<|channel>", "<channel|>")),
    ("think", ("</think>",)),
)
_REASONING_TOKENS = (("mistral", "[THINK]"), ("think", "<think>"))
"""Tokens that tell it where the template does not."""
_REPEATED_GROUP = re.compile(r"\)[*+{]|\\\d")
"""What an expression needs for the number of its attempts to explode: a repeated group, or a reference to one."""
_ESCAPE = re.compile(r"\\(.)")


def detect_format(traits: ChatTraits, config: ModelConfig) -> ChatFormat:
    """Return the formats that a model's files show, or those that are configured."""
    response = _ESCAPE.sub(r"\1", _ESCAPE.sub(r"\1", traits.response_template))
    if response and (config.tool_format, config.reasoning_format) == ("auto", "auto"):
        described = _described(traits, response)
        if described is not None:
            return described
    tools: str | None = config.tool_format
    if tools == "auto":
        tools = _first(_TOOL_SIGNS, response) or _first(_TOOL_SIGNS, traits.templates) or DEFAULT_TOOL_FORMAT
    reasoning: str | None = config.reasoning_format
    if reasoning == "auto":
        reasoning = _first(_REASONING_SIGNS, response) or _first(_REASONING_SIGNS, traits.templates)
        reasoning = reasoning or _by_token(traits)
    tools, reasoning = (None if each == "none" else each for each in (tools, reasoning))
    marks = marks_of(tools, reasoning)
    tokens = [token for token in traits.added_tokens if token.name in marks]
    log.info("format of calls of tools: %s, of reasoning: %s", tools or "none", reasoning or "none")
    return ChatFormat(
        tools=tools,
        reasoning=reasoning,
        special_marks=tuple((token.name, token.token_id) for token in tokens if token.special),
        added_marks=tuple((token.name, token.token_id) for token in tokens if not token.special),
    )


def _described(traits: ChatTraits, response: str) -> ChatFormat | None:
    """Return the form that only the tokenizer's description knows; None where a parser of ours knows it too."""
    if _first(_TOOL_SIGNS, response) or (_first(_REASONING_SIGNS, response) and '"tool_calls"' not in response):
        return None
    if any(map(_REPEATED_GROUP.search, _expressions(json.loads(traits.response_template)))):
        log.warning("the tokenizer's response_template is not used: its expressions may take for ever")
        return None
    special = [token for token in traits.added_tokens if token.special and token.name in response]
    log.info("chats: calls of tools and reasoning as the tokenizer's response_template describes them")
    return ChatFormat(
        tools=DESCRIBED,
        reasoning=DESCRIBED,
        special_marks=tuple((token.name, token.token_id) for token in special),
        description=traits.response_template,
    )


def _expressions(description: Any) -> Iterator[str]:
    """Yield the regular expressions in a description, wherever they stand."""
    if isinstance(description, dict):
        for key, value in description.items():
            if key.endswith("pattern") and isinstance(value, str):
                yield value
            else:
                yield from _expressions(value)


def _first(signs: tuple[tuple[str, tuple[str, ...]], ...], text: str) -> str | None:
    return next((name for name, needed in signs if all(sign in text for sign in needed)), None)


def _by_token(traits: ChatTraits) -> str | None:
    names = {token.name for token in traits.added_tokens}
    return next((name for name, token in _REASONING_TOKENS if token in names), None)
