"""Generates for all prompts of one HTTP request, of which each may fail on its own."""

from collections.abc import Sequence

from app.errors import ModelNotFound, QuotaExceeded, RateLimited, ServiceUnavailable
from app.events import Response
from app.generation.batch import Generate, generate_each
from app.requests import GenerationRequest
from app.web.http.dependencies import RequestContext
from app.web.http.sse import cancel_on_disconnect


async def generate_all(
    context: RequestContext, generate: Generate, requests: Sequence[GenerationRequest]
) -> list[Response | Exception]:
    """Return for each request its response, or what went wrong with it.

    Raises: ServiceUnavailable, ModelNotFound: it refused every prompt, so that clients and load balancers see its
        status and retry.
    """
    outcomes = await cancel_on_disconnect(context.request, generate_each(generate, requests))
    first = outcomes[0]
    if isinstance(first, ServiceUnavailable | ModelNotFound) and all(type(first) is type(each) for each in outcomes):
        raise first
    for outcome in outcomes:
        if isinstance(outcome, RateLimited | QuotaExceeded):
            context.admitted.refuse(outcome)
    return outcomes
