"""What every route that loads or unloads a model shares: the token for the hub, and how such a request may end."""

from typing import Annotated

from pydantic import Field, SecretStr

from app.errors import (
    Conflict,
    Forbidden,
    InsufficientMemory,
    InternalError,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    RateLimited,
    ServiceUnavailable,
    Unauthorized,
)
from app.web.http.errors import error_responses

HubToken = Annotated[SecretStr, Field(min_length=1, max_length=512)]

UNLOAD_ERRORS = error_responses(
    InvalidRequest, Unauthorized, Forbidden, ModelNotFound, Conflict, RateLimited, InternalError
)
LOAD_ERRORS = UNLOAD_ERRORS | error_responses(ModelLoadFailed, InsufficientMemory, ServiceUnavailable)
"""Of OpenAPI's `responses`."""


def revealed(token: SecretStr | None) -> str | None:
    """Return a token's text."""
    return token.get_secret_value() if token is not None else None
