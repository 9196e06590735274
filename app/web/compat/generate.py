"""POST /generate, a path that two older services have: the fields of a request tell whose client sent it."""

from typing import Self

from fastapi import APIRouter
from pydantic import Field, model_validator
from starlette.responses import Response as HttpResponse

from app.web.compat.completion_fields import ModelName, Prompt, check_prompt
from app.web.compat.inference_api import CompletionsResponse, GenerationParameters, complete
from app.web.compat.microservice import ContinuedText, continue_text
from app.web.http.dependencies import RequestContextDep
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import GeneratingRoute, StrictModel
from app.web.http.sampling_params import AdapterField, TokenCount

router = APIRouter(tags=["compat"], route_class=GeneratingRoute)


class GenerateBody(StrictModel):
    """A prompt with `parameters` or the name of a model, or with neither of them."""

    prompt: Prompt
    model_name: ModelName | None = None
    adapter: AdapterField = None
    parameters: GenerationParameters | None = None
    max_new_tokens: TokenCount | None = Field(None, description="Only without the three fields above.")

    @model_validator(mode="after")
    def _is_of_one_service(self) -> Self:
        if self.has_parameters and self.max_new_tokens is not None:
            raise ValueError("max_new_tokens is only possible where parameters, model_name and adapter are left out")
        return self

    @property
    def model(self) -> str | None:
        """Return the name of the model under the name that it has on other routes."""
        return self.model_name

    @property
    def has_parameters(self) -> bool:
        """Return whether it is a request of the service that nests its parameters."""
        return self.parameters is not None or self.model_name is not None or self.adapter is not None

    @property
    def answers(self) -> int:
        return (self.parameters and self.parameters.num_return_sequences) or 1


@router.post(
    "/generate",
    response_model=CompletionsResponse | ContinuedText,
    responses=error_responses(*GENERATION_ERRORS),
)
async def generate(body: GenerateBody, context: RequestContextDep) -> HttpResponse:
    """Complete a text.  With `parameters` or `model_name` the response has completions with their tokens, without
    them the prompt and its continuation as one text."""
    check_prompt(context, "prompt", body.prompt)
    if body.has_parameters:
        parameters = body.parameters or GenerationParameters()
        return await complete(context, body.prompt, parameters, model=body.model_name, adapter=body.adapter)
    return await continue_text(context, body.prompt, body.max_new_tokens)
