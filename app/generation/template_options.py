"""Which variables of the model's chat template a request sets, and what it means by a reasoning effort."""

from msgspec import structs

from app.engine.base import EngineInfo
from app.errors import InvalidRequest, is_plain_name
from app.requests import GenerationRequest, TemplateValue

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates let a model think or not, the one that most have first."""
EFFORT = "reasoning_effort"


def resolve_template_options(request: GenerationRequest, info: EngineInfo) -> GenerationRequest:
    """Return a request that sets only variables that the model's chat template reads.

    A reasoning effort becomes the template's variable of that name, else its switch: `none` is off, any other on.  To
    want no reasoning of a template that has no choice changes nothing.

    Raises: InvalidRequest: it sets another variable, or wants an effort that the template does not know.
    """
    if not request.template_kwargs and request.reasoning_effort is None:
        return request
    reads = info.template_variables
    if reads is None:
        return request
    known = {name: value for name, value in request.template_kwargs if not _is_neutral(name, value, reads)}
    for name in known:
        if name not in reads:
            raise _unknown(name, reads)
    if (effort := request.reasoning_effort) is not None:
        switch = next((name for name in SWITCHES if name in reads), None)
        if EFFORT in reads:
            known.setdefault(EFFORT, effort)
        elif switch is not None:
            known.setdefault(switch, effort != "none")
        elif effort != "none":
            raise InvalidRequest.of_field(EFFORT, "is not supported: this model's chat template knows only none")
    return structs.replace(request, template_kwargs=tuple(sorted(known.items())))


def _is_neutral(name: str, value: TemplateValue, reads: tuple[str, ...]) -> bool:
    """Return whether a variable is left out, or only says that there shall be no reasoning where there is none."""
    if value is None:
        return True
    return name not in reads and ((name in SWITCHES and value is False) or (name == EFFORT and value == "none"))


def _unknown(name: str, reads: tuple[str, ...]) -> InvalidRequest:
    field = f"chat_template_kwargs.{name}" if is_plain_name(name) else "chat_template_kwargs"
    known = f"it reads {', '.join(reads)}" if reads else "it reads none"
    return InvalidRequest.of_field(field, f"is no variable of this model's chat template; {known}")
