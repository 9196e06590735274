"""The name of a key's owner, as several dialects take it."""

from typing import Annotated

from pydantic import StringConstraints

OwnerName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._ -]{1,128}$")]
"""No e-mail address: the name appears in every usage report."""
