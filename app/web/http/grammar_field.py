"""Which field of a request its grammar comes from, so that what refuses the grammar later can name it."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from app.errors import InvalidRequest
from app.events import Event
from app.requests import GenerationRequest


async def named_by_field(events: AsyncGenerator[Event, None], field: str) -> AsyncGenerator[Event, None]:
    """Yield the events of a request; a refusal of its grammar names the field that the client has set."""
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except InvalidRequest as error:
        found = (error.details or {}).get("errors", ())
        if len(found) == 1 and found[0]["field"] == "grammar":
            raise InvalidRequest.of_field(field, found[0]["reason"]) from None
        raise


def check_tools(request: GenerationRequest, field: str) -> None:
    """Raises: InvalidRequest: the completion must be a call of a tool, and cannot be anything else as well."""
    if request.tools and request.tool_choice.mode == "required":
        raise InvalidRequest.of_field(field, "is not possible together with a tool_choice that requires a call")
