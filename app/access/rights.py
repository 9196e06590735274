"""Checks a request against the rights of its caller's role."""

from app.errors import Forbidden
from app.types import Principal

_SYSTEM_TEXT = {
    "messages": "hold a system message, which the role of this API key does not allow",
    "tools": "describe themselves in the system message, which the role of this API key does not allow",
    "chat_template_kwargs": "hold a text for the system message, which the role of this API key does not allow",
}


def check_rights(
    principal: Principal, *, model: str, logprobs: bool, system_text: str | None, control_tokens: bool
) -> None:
    """Check a request against its caller's role.

    Args:
        model: the name of the model that is to generate.
        logprobs: whether log-probabilities are requested.
        system_text: the field by which the caller writes into the system message; None where none does.
        control_tokens: whether the caller sends token ids with control tokens among them.
    Raises: Forbidden: the role does not allow one of them; the field is named.
    """
    rights = principal.rights
    if rights.models is not None and model not in rights.models:
        raise Forbidden.of_field("model", "is one that the role of this API key does not allow")
    if logprobs and not rights.raw_logprobs:
        raise Forbidden.of_field("logprobs", "are not allowed by the role of this API key")
    if system_text is not None and not rights.system_messages:
        raise Forbidden.of_field(system_text, _SYSTEM_TEXT[system_text])
    if control_tokens and not (rights.control_tokens and rights.system_messages):
        raise Forbidden.of_field("prompt", "holds a control token, which the role of this API key does not allow")
