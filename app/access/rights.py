"""Checks a request against the rights of its caller's role."""

from app.errors import Forbidden
from app.types import Principal


def check_rights(principal: Principal, *, model: str, logprobs: bool, system_messages: bool) -> None:
    """Check a request against its caller's role.

    Args:
        model: the name of the model that is to generate.
        logprobs: whether log-probabilities are requested.
        system_messages: whether the caller sends messages of the role system.
    Raises: Forbidden: the role does not allow one of them.
    """
    rights = principal.rights
    if rights.models is not None and model not in rights.models:
        raise Forbidden("The role of this API key does not allow this model.")
    if logprobs and not rights.raw_logprobs:
        raise Forbidden("The role of this API key does not allow log-probabilities.")
    if system_messages and not rights.system_messages:
        raise Forbidden("The role of this API key does not allow system messages.")
