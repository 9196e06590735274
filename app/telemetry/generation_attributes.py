"""What spans say of a generation: the attributes of OpenTelemetry's conventions for GenAI, and its stages."""

from collections.abc import Iterator, Sequence
from typing import Any

from app.requests import GenerationRequest, Times
from app.telemetry.tracing import GenerationOutcome


def stages(times: Times) -> Iterator[tuple[str, float | None, float | None, dict[str, float]]]:
    """Yield name, begin, end and attributes of each stage of a generation; moments by the monotonic clock."""
    yield "queue", times.accepted, times.began, {}
    yield "prefill", times.began, times.first_token, {}
    yield "decode", times.first_token, times.ended, {}
    if times.filter_seconds:
        # It works on each piece of the text as it comes.
        yield "pii out", times.first_token, times.ended, {"llm_service.pii.seconds": times.filter_seconds}


def requested(name: str, samples: Sequence[GenerationRequest]) -> dict[str, Any]:
    """Return what the conventions have for a request."""
    request = samples[0]
    params = request.sampling
    return {
        "gen_ai.operation.name": "chat" if request.is_chat else "text_completion",
        "gen_ai.provider.name": "llm_service",
        "gen_ai.request.model": name,
        "gen_ai.response.model": name,
        "gen_ai.response.id": request.id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": float(params.temperature),
        "gen_ai.request.top_p": float(params.top_p),
        "gen_ai.request.stream": request.stream,
        **({"gen_ai.request.choice.count": len(samples)} if len(samples) > 1 else {}),
        **({} if params.seed is None else {"gen_ai.request.seed": params.seed}),
    }


def ended(outcome: GenerationOutcome) -> dict[str, Any]:
    """Return what the conventions have for the end of a request."""
    texts = {"gen_ai.input.messages": outcome.input, "gen_ai.output.messages": outcome.output}
    return {
        "gen_ai.usage.input_tokens": outcome.prompt_tokens,
        "gen_ai.usage.output_tokens": outcome.completion_tokens,
        "gen_ai.response.finish_reasons": [reason.value for reason in outcome.reasons],
        **{name: text for name, text in texts.items() if text is not None},
    }
