"""Validates a decoded body, in the forms in which clients write what the schema says.

A field that the schema does not have is left out if it is null or empty, and 20.0 is taken for 20.  Where the operator
allows it, fields that the service does not have or cannot honour are left out as well, and named in a response header.
Only a body that the schema refuses is looked at again, so that any other costs nothing more.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError
from starlette.types import Scope

from app.errors import is_plain_name
from app.web.http.errors import KIND

IGNORED_FIELDS = "ignored_fields"
"""Key in a request's state: the paths of the fields that were left out, for the header."""
IGNORED_FIELDS_HEADER = "X-Ignored-Fields"
UNSUPPORTED = "unsupported_value"
"""pydantic's type of the error of a field that the service has, but cannot honour."""
MAX_REPAIRS = 256
"""Mistakes up to which a body is repaired; no client has so many, and each of them is paid for on the event loop."""
MAX_LISTED = 8192
"""Mistakes up to which they are listed, which pydantic does only for all of them at once: some 20 ms."""
MAX_ROUNDS = 4
"""Validations of one body: leaving out a field may let another be seen."""
MAX_NAMES = 20
MAX_INTEGER = 2**63
_UNNAMED = "-"
"""Stands for a name that may be a secret in the wrong place."""
_MORE = "..."

Schema = TypeVar("Schema", bound=BaseModel)


def unsupported(reason: str) -> PydanticCustomError:
    """Return the error that a validator raises for a value that the service cannot honour."""
    return PydanticCustomError(UNSUPPORTED, "{reason}", {"reason": reason})


def validated(schema: type[Schema], value: Any, *, ignored: list[str] | None) -> Schema:
    """Return a body as its schema has it.

    Args:
        value: changed in place where its form is another one.
        ignored: gets the paths of fields that the service does not have or cannot honour; None: they are refused.
    Raises: RequestValidationError, with the locations and messages of FastAPI's own validation.
    """
    for rest in reversed(range(MAX_ROUNDS)):
        try:
            return schema.model_validate(value, from_attributes=True)
        except ValidationError as error:
            found = _mistakes(error)
            if not rest or error.error_count() > MAX_REPAIRS or not _repair(value, found, ignored):
                raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in found]) from None
    raise AssertionError("the last round returns or raises")


def name_ignored(scope: Scope, paths: Sequence[str]) -> None:
    """Let the response name fields that were ignored, whatever becomes of the request."""
    if paths:
        scope["state"].setdefault(IGNORED_FIELDS, []).extend(paths)


def ignored_fields_header(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Return the header that names the ignored fields, as ASGI writes it; none if there are none."""
    paths: list[str] | None = scope["state"].get(IGNORED_FIELDS)
    if paths is None:
        return []
    named = ", ".join([*paths[:MAX_NAMES], *([_MORE] if len(paths) > MAX_NAMES else [])])
    return [(IGNORED_FIELDS_HEADER.lower().encode(), named.encode())]


def _mistakes(error: ValidationError) -> Sequence[Any]:
    """Return the first mistakes in a body, in pydantic's form; of far too many only their number."""
    count = error.error_count()
    if count > MAX_LISTED:
        return [{"type": "value_error", "loc": (), "msg": f"holds {count} mistakes, too many to name them"}]
    return error.errors(include_url=False, include_context=False, include_input=False)[:MAX_REPAIRS]


def _repair(value: Any, found: Sequence[Any], ignored: list[str] | None) -> bool:
    """Change what was written in another form, and return whether there was any; adds what it ignores to `ignored`."""
    repaired = False
    for item in found:
        location = [part for part in item["loc"] if not str(part).startswith(KIND)]
        *outer, last = location or (None,)
        holder = _at(value, outer)
        if not _holds(holder, last):
            continue
        given, kind = holder[last], item["type"]
        if kind == "int_type" and type(given) is float and given.is_integer() and abs(given) <= MAX_INTEGER:
            holder[last] = int(given)
        elif isinstance(holder, dict) and kind == "extra_forbidden" and _is_empty(given):
            del holder[last]
        elif isinstance(holder, dict) and kind in ("extra_forbidden", UNSUPPORTED) and ignored is not None:
            del holder[last]
            ignored.append(_path(location))
        else:
            continue
        repaired = True
    return repaired


def _at(value: Any, location: Sequence[Any]) -> Any:
    """Return what stands at a location of a body; None if nothing does, as below the branch of a union."""
    for part in location:
        if not _holds(value, part):
            return None
        value = value[part]
    return value


def _holds(holder: Any, part: Any) -> bool:
    if isinstance(holder, dict):
        return part in holder
    return isinstance(holder, list) and isinstance(part, int) and part < len(holder)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _path(location: Sequence[str | int]) -> str:
    """Return the path of a field for a header: plain words and positions, which no line break or secret can be in."""
    return ".".join(str(part) if isinstance(part, int) or is_plain_name(part) else _UNNAMED for part in location)
