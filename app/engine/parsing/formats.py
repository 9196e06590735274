"""The formats by their names, as `model.tool_format` and `model.reasoning_format` take them."""

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.engine.parsing.families import deepseek, gemma, harmony, hermes, llama, mistral, phi
from app.engine.parsing.marks import Marks
from app.engine.parsing.output import ParsedOutput
from app.engine.parsing.reasoning import THOUGHTS
from app.engine.parsing.scanner import Scan, Scanner

Parse = Callable[[Scanner, ParsedOutput, Marks], Scan[None]]
HARMONY = "harmony"
"""A format that is both: one parser reads reasoning and calls."""
_ALPHANUMERICS = string.ascii_letters + string.digits


def new_call_id() -> str:
    """Return an id as OpenAI writes it."""
    return f"call_{secrets.token_hex(12)}"


def new_mistral_id() -> str:
    """Return an id as Mistral's templates want it."""
    return "".join(secrets.choice(_ALPHANUMERICS) for _ in range(9))


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family writes calls of tools."""

    name: str
    parse: Parse | None
    """Reads the answer and its calls; None: harmony's parser, which needs the prompt's end."""
    marks: tuple[str, ...]
    """What may be tokens of the model's own."""
    new_id: Callable[[], str] = new_call_id


_MISTRAL_MARKS = (mistral.CALLS, mistral.ARGS, mistral.CALL_ID)
_DEEPSEEK_MARKS = (
    deepseek.CALLS_BEGIN,
    deepseek.CALLS_END,
    deepseek.BEGIN,
    deepseek.END,
    deepseek.SEPARATOR,
)

TOOL_FORMATS: Mapping[str, ToolFormat] = {
    each.name: each
    for each in (
        ToolFormat("hermes", hermes.parse_hermes, (hermes.BEGIN, hermes.END)),
        ToolFormat("qwen_xml", hermes.parse_qwen_xml, (hermes.BEGIN, hermes.END)),
        ToolFormat("llama", llama.parse_llama, (llama.TAG,)),
        ToolFormat("mistral", mistral.parse_mistral, _MISTRAL_MARKS, new_id=new_mistral_id),
        ToolFormat("mistral_args", mistral.parse_mistral, _MISTRAL_MARKS, new_id=new_mistral_id),
        ToolFormat("deepseek", deepseek.parse_deepseek, _DEEPSEEK_MARKS),
        ToolFormat("deepseek_v31", deepseek.parse_deepseek, _DEEPSEEK_MARKS),
        ToolFormat("gemma4", gemma.parse_gemma4, (gemma.GEMMA_4.begin, gemma.GEMMA_4.end, gemma.GEMMA_4.quote)),
        ToolFormat(
            "function_gemma",
            gemma.parse_function_gemma,
            (gemma.FUNCTION_GEMMA.begin, gemma.FUNCTION_GEMMA.end, gemma.FUNCTION_GEMMA.quote),
        ),
        ToolFormat("phi", phi.parse_phi, (phi.BEGIN, phi.END)),
        ToolFormat(HARMONY, None, harmony.MARKS),
    )
}


def marks_of(tools: str | None, reasoning: str | None) -> tuple[str, ...]:
    """Return the marks of a format of tools and one of reasoning."""
    marks = TOOL_FORMATS[tools].marks if tools else ()
    if reasoning == HARMONY:
        marks = (*marks, *harmony.MARKS)
    elif reasoning is not None:
        marks = (*marks, THOUGHTS[reasoning].begin, THOUGHTS[reasoning].end)
    return tuple(dict.fromkeys(marks))
