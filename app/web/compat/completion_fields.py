"""What the routes of older services share: a plain prompt, its sampling parameters, and their limits."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from app.errors import InvalidRequest
from app.requests import GenerationRequest
from app.web.http.dependencies import RequestContext
from app.web.http.sampling_params import check_length, split_params

Prompt = Annotated[str, StringConstraints(min_length=1)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Temperature = Annotated[float, Field(ge=0, le=2)]


def completion_request(
    context: RequestContext, prompt: str, sampling: Mapping[str, Any], **fields: Any
) -> GenerationRequest:
    """Return the request to complete a plain prompt.

    Args:
        sampling: by the names of `SamplingParams`; None is not given.
        fields: of the request beside these.
    """
    params, unset = split_params(sampling)
    return context.generation(text=prompt, sampling=params, unset=unset, cache=context.may_cache, **fields)


def check_prompt(context: RequestContext, field: str, *prompts: str) -> None:
    """Raises: PromptTooLong: the prompts have more characters together than the service takes."""
    check_length(field, sum(map(len, prompts)), context.max_prompt_chars)


def check_most(field: str, given: int | None, most: int, setting: str) -> None:
    """Raises: InvalidRequest: a number of tokens is above the limit of its route."""
    if given is not None and given > most:
        raise InvalidRequest.of_field(field, f"must be at most {most} on this route (compat.{setting})")
