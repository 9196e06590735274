"""LLM Inference Microservice: a prompt on POST /generate, which its response repeats in front of the completion.

It shares the path with another system's; `generate.py` tells the two apart.
"""

from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.web.compat.completion_fields import check_most, completion_request
from app.web.http.dependencies import RequestContext
from app.web.http.json_encoding import EncodedJsonResponse
from app.web.http.sse import collect_response


class ContinuedText(TypedDict):
    """A text and its continuation."""

    generated_text: str
    """Begins with the prompt."""


async def continue_text(context: RequestContext, prompt: str, max_new_tokens: int | None) -> HttpResponse:
    """Continue a text.

    Raises: InvalidRequest: `max_new_tokens` is above the limit of the route.
    """
    limits = context.container.settings.compat
    check_most("max_new_tokens", max_new_tokens, limits.generate_most_new_tokens, "generate_most_new_tokens")
    request = completion_request(
        context,
        prompt,
        {"max_tokens": max_new_tokens},
        default_max_tokens=limits.generate_max_new_tokens,
        stream=False,
    )
    response = await collect_response(context.request, context.events(request))
    return EncodedJsonResponse({"generated_text": (response.prompt or "") + response.text})
