"""A request as a remote engine gets it."""

from typing import Any

from app.requests import GenerationRequest
from app.types import Message, Role, SamplingParams, Tenant


def make_request(name: str = "one", *, sampling: dict[str, Any] | None = None, **fields: Any) -> GenerationRequest:
    """Return a chat of 9 tokens.  Args: sampling: of its parameters; fields: others of the request."""
    prompt: dict[str, Any] = {"messages": (Message(Role.USER, "Hello"),), "counted_tokens": 9}
    params = SamplingParams(**{"max_tokens": 20, **(sampling or {})})
    return GenerationRequest(**{"id": name, "tenant": Tenant.owner("t"), "sampling": params, **prompt, **fields})
