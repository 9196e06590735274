"""Encodes responses and stream frames as compact JSON, non-ASCII characters unescaped."""

import math
from typing import Any

import msgspec
from starlette.responses import JSONResponse


def _plain(value: Any) -> str:
    """Return the text of a `str` subclass, such as LangChain's; msgspec encodes exact types only."""
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_encoder = msgspec.json.Encoder(enc_hook=_plain)


def encode_json(data: Any) -> bytes:
    """Encode plain data; a float in it that may be tiny, huge or not finite is to be wrapped in `exact_float`.

    Raises: UnicodeEncodeError: a string holds half of a surrogate pair.
    """
    return _encoder.encode(data)


def exact_float(number: float) -> msgspec.Raw:
    """Return a number for `encode_json` with the digits of `repr`, as `json.dumps` writes it.

    msgspec by itself writes -2e-05 as -0.00002, 1e+16 as 1e16, and NaN as null.

    Raises: ValueError: the number is NaN or infinite, which JSON cannot express.
    """
    if not math.isfinite(number):
        raise ValueError("not a JSON number")
    return msgspec.Raw(repr(number).encode())


class EncodedJsonResponse(JSONResponse):
    """A JSON response encoded by `encode_json`."""

    def render(self, content: Any) -> bytes:
        return encode_json(content)
