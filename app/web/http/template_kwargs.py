"""The request fields that set variables of the model's chat template, in every dialect."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema

from app.errors import InvalidRequest
from app.requests import TemplateValue

MAX_VARIABLES, MAX_VALUE_CHARS = 16, 256

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def _variables(value: Any) -> Any:
    """Check the variables; no message quotes a name, which is the client's text.

    Raises: ValueError: there are too many, or one is no text, number or boolean.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or not all(_NAME.fullmatch(name) for name in value):
        raise ValueError("must be an object with names of variables for keys")
    if len(value) > MAX_VARIABLES:
        raise ValueError(f"holds more than {MAX_VARIABLES} variables")
    if not all(each is None or type(each) in (str, bool, int, float) for each in value.values()):
        raise ValueError("must have texts, numbers and booleans for values")
    if any(len(str(each)) > MAX_VALUE_CHARS for each in value.values()):
        raise ValueError(f"holds a value of more than {MAX_VALUE_CHARS} characters")
    return value


_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": f"^{_NAME.pattern}$"},
    "additionalProperties": {"type": ["string", "boolean", "number", "null"], "maxLength": MAX_VALUE_CHARS},
    "maxProperties": MAX_VARIABLES,
}
TemplateKwargs = Annotated[
    dict[str, TemplateValue] | None,
    BeforeValidator(_variables),
    WithJsonSchema({"anyOf": [_SCHEMA, {"type": "null"}]}),
]


def template_variables(
    given: dict[str, TemplateValue] | None, *, enable_thinking: bool | None = None
) -> tuple[tuple[str, TemplateValue], ...]:
    """Return the variables that a request sets, sorted; null sets none.

    Raises: InvalidRequest: `enable_thinking` stands beside a different one among them.
    """
    variables = {name: value for name, value in (given or {}).items() if value is not None}
    if enable_thinking is not None and variables.setdefault("enable_thinking", enable_thinking) is not enable_thinking:
        raise InvalidRequest.of_field("enable_thinking", "and the one in chat_template_kwargs have different values")
    return tuple(sorted(variables.items()))
