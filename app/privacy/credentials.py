"""Matches API keys, tokens and private keys at a given position of a shadow text.

A key is recognised by a beginning of bounded length; its rest may have any length and is found by a rule that can be
applied again to every next part of it, because a stream drops the rest as it arrives.
"""

from __future__ import annotations

import re
from typing import NamedTuple

JWT_HEADER = 512
JWT_REACH = JWT_HEADER + 16
PEM_REACH = 128
"""Longest beginning of a private key, up to the first characters of its body."""

_API_KEY = re.compile(
    r"(?:sk-(?:(?=[A-Za-z0-9_\-]{0,30}?[A-Z])(?=[A-Za-z0-9_\-]{0,30}?[0-9])[A-Za-z0-9_\-]{16}"
    r"|(?=[a-z\-]{0,20}[0-9])(?:[a-z]{2,8}-){0,2}[a-z0-9]{24}|(?=[A-Za-z]{0,30}[A-Z])[A-Za-z0-9]{20})"
    r"|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{10}"
    r"|llm_[A-Za-z0-9]{4,32}_(?:(?=[A-Za-z0-9_\-]{0,11}[0-9A-Z])[A-Za-z0-9_\-]{12}|[A-Za-z0-9]{24})"
    r"|hf_(?:(?=[A-Za-z0-9]{0,15}[0-9A-Z])[A-Za-z0-9]{16}|[A-Za-z0-9]{20})"
    r"|gh[pousr]_[A-Za-z0-9]{16}|github_pat_[A-Za-z0-9_]{16}|glpat-[A-Za-z0-9_\-]{16}|A[KS]IA[A-Z0-9]{16}"
    r"|xox[a-z]-(?=[A-Za-z0-9\-]{0,9}[0-9])[A-Za-z0-9\-]{10}|AIza[A-Za-z0-9_\-]{24})"
)
_JWT = re.compile(rf"eyJ[A-Za-z0-9_\-]{{14,{JWT_HEADER}}}+\.[A-Za-z0-9_\-]{{8}}")
_AUTHORIZATION = re.compile(r"authorization[\"']?[ \t]?[:=][ \t]?[\"']?(?:bearer|basic|token) \Z", re.IGNORECASE)
# Of one case and without a digit it is a placeholder: YOUR_TOKEN_HERE.
_BEARER = re.compile(
    r"(?=[A-Za-z0-9._~+/=\-]{0,11}(?:[0-9]|[a-z][A-Za-z._~+/=\-]{0,10}[A-Z]|[A-Z][A-Za-z._~+/=\-]{0,10}[a-z]))"
    r"[A-Za-z0-9._~+/=\-]{12}"
)
_DASHES = "-----"
_PEM_NAME = r"(?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?"
_PEM = re.compile(rf"-----BEGIN {_PEM_NAME}-----(?:\\[nr]|\s){{1,6}}[A-Za-z0-9+/=\-]{{8}}")
_PEM_END = re.compile(rf"-----END {_PEM_NAME}-----")
_PEM_PARTIAL_END = re.compile(r"\s{0,32}|-{1,5}|-----(?:E|EN|END[A-Z0-9 ]{0,60}-{0,4})")
PEM_OPEN = re.compile(
    r"-----(?:B|BE|BEG|BEGI|BEGIN[A-Z0-9 ]{0,60}-{0,5}(?:\\?[nr]?|\s){0,12}\\?[A-Za-z0-9+/=\-]{0,8})?\Z|-{1,5}\Z"
)
JWT_OPEN = re.compile(rf"eyJ[A-Za-z0-9_\-]{{0,{JWT_HEADER}}}+(?:\.[A-Za-z0-9_\-]{{0,7}})?\Z")

_RESTS = {
    "key": re.compile(r"[A-Za-z0-9_\-]*+"),
    "token": re.compile(r"(?:[A-Za-z0-9_\-]|\.(?=[A-Za-z0-9_\-]))*+"),
    "bearer": re.compile(r"(?:[A-Za-z0-9_~+/=\-]|\.(?=[A-Za-z0-9_~+/=\-]))*+"),
    # White space only in front of more: what follows may be a sign in brackets, which the space before it belongs to.
    "pem": re.compile(r"(?:[A-Za-z0-9+/=:,\\]|\s{1,32}(?=[A-Za-z0-9+/=:,\\\-])|-(?=[A-Za-z0-9]))*+"),
}
"""The rest of a key after its recognised beginning, by rule."""


class KeyRest(NamedTuple):
    """Where the rest of a key ends in a text."""

    end: int
    open: bool
    """Whether text that follows could continue it."""


def api_key(shadow: str, start: int, left: str) -> int:
    beginning = _API_KEY.match(shadow, start) or _JWT.match(shadow, start) or _PEM.match(shadow, start)
    if beginning is None and _AUTHORIZATION.search(left):
        beginning = _BEARER.match(shadow, start)
    return -1 if beginning is None else key_rest(key_rule(shadow, start), shadow, beginning.end()).end


def key_rule(shadow: str, start: int) -> str:
    """Return the rule by which the key at `start` continues after its recognised beginning."""
    if shadow.startswith(_DASHES, start):
        return "pem"
    if _API_KEY.match(shadow, start):
        return "key"
    return "token" if _JWT.match(shadow, start) else "bearer"


def key_rest(rule: str, shadow: str, start: int) -> KeyRest:
    """Return the rest of a key whose recognised beginning, or an earlier part of the rest, ends at `start`."""
    found = _RESTS[rule].match(shadow, start)
    end = found.end() if found else start
    if rule != "pem":
        return KeyRest(end, shadow[end:] in ("", "."))
    if last := _PEM_END.match(shadow, end):
        return KeyRest(last.end(), open=False)
    return KeyRest(end, _PEM_PARTIAL_END.fullmatch(shadow, end) is not None)
