"""Reads the parameters of a header, such as the charset of a content type, by the standard library's reader of mail.

That one trusts who wrote the mail: its time grows with the square of the length, it raises whatever it comes to where
the parts of a value do not fit, and it decodes by any codec of Python.
"""

from email.message import Message
from email.utils import collapse_rfc2231_value

MAX_CHARS = 1024
"""Length of a header that is read: under a millisecond at worst, and more than the name of any file needs."""
_CHARSETS = ("utf-8", "us-ascii", "iso-8859-1")
"""Of values that name their charset."""


def parameter(message: Message, name: str, *, header: str = "content-type") -> str | None:
    """Return a parameter of a header, decoded; None if the header does not have it.

    Raises: ValueError: the header is too long, or its parameters cannot be read.
    """
    if len(message.get(header, "")) > MAX_CHARS:
        raise ValueError("too long")
    try:
        value = message.get_param(name, header=header)
    except (TypeError, IndexError):
        raise ValueError("the parts of a value do not fit") from None
    if isinstance(value, tuple) and (value[0] or "us-ascii").lower() not in _CHARSETS:
        raise ValueError("a value is in another charset")
    return None if value is None else collapse_rfc2231_value(value)
