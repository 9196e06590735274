"""EmbeddingService: the one path from a request for vectors to them, with the admission of every other request."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from msgspec import structs

from app.embeddings import EmbeddingInfo, EmbeddingRequest, Embeddings, EncodedInputs
from app.engine.base import EngineInfo
from app.engine.deadline import deadline
from app.engine.host import ModelHost
from app.engine.served_model import EmbeddingChain, ServedEncoder
from app.errors import EngineNotReady, ShuttingDown
from app.generation.metering import Admission, UsageRecorder
from app.privacy.filters import InputFilter
from app.telemetry import Metrics
from app.telemetry.tracing import NO_TRACER, Tracer
from app.types import Principal


class EmbeddingService:
    """Texts in, vectors out; lives as long as the application."""

    def __init__(
        self,
        *,
        host: ModelHost,
        input_filter: InputFilter | None,
        metrics: Metrics,
        admission: Admission,
        usage: UsageRecorder,
        waiting_seconds: float = 30,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        """Args:
        input_filter: None lets every text through.
        admission: says what a caller may do, and takes tokens out of their limits.
        usage: charges each request to its caller and logs it.
        waiting_seconds: how long a request may wait for its preparation.
        tracer: measures the stages of a request.
        """
        self._host = host
        self._input_filter = input_filter
        self._metrics = metrics
        self._admission = admission
        self._usage = usage
        self._waiting_seconds = waiting_seconds
        self._tracer = tracer

    def status(self) -> dict[str, Any]:
        """Return figures for people: each model that only embeds, by its name."""
        encoders = (model for model in self._host.models if isinstance(model, ServedEncoder))
        return {model.name: asdict(model.engine.status()) for model in encoders}

    async def embed(self, request: EmbeddingRequest, principal: Principal) -> Embeddings:
        """Return the vectors of a request's texts; cancelling this ends the request within a pass.

        Raises: AppError: the request is wrong, cannot be taken, or breaks.
        """
        lease = self._host.lease_embedding(request, allowed=principal.rights.models)
        with self._usage.record(request, principal) as record, lease as (model, chain):
            info, embedding = _checked(model.engine.info, request)
            self._admission.check_rights(
                principal, model=model.name, logprobs=False, system_text=None, control_tokens=False
            )
            await self._admission.check_tokens(principal, len(request.inputs))
            async with deadline(self._waiting_seconds, "The texts took too long to prepare."):
                request = await self._clean(request, chain)
                with self._tracer.span("template"):
                    encoded = await chain.prepare(request)
            encoded.check(embedding, info.vocab_size)
            record.begin_texts(info, encoded.tokens, [each for each in request.inputs if isinstance(each, str)])
            async with self._admission.reserve(principal, encoded.tokens) as reservation:
                with record.charge_texts(request, reservation):
                    if self._host.over:
                        raise ShuttingDown()
                    with self._tracer.span(f"embeddings {model.name}", _described(model.name, encoded)):
                        embeddings = await chain.run(structs.replace(request, encoded=encoded))
            self._metrics.model(model.name).embedded(encoded.tokens, len(encoded.token_ids))
            return structs.replace(embeddings, model=model.name)

    async def _clean(self, request: EmbeddingRequest, chain: EmbeddingChain) -> EmbeddingRequest:
        """Clean the texts; those that arrive as tokens stay as they are where nothing is filtered out."""
        if self._input_filter is None:
            return request
        texts = [each if isinstance(each, str) else await chain.detokenize(each) for each in request.inputs]
        with self._tracer.span("pii in"):
            clean = await self._input_filter.clean(request.tenant, texts)
        return structs.replace(request, inputs=_replaced(request.inputs, texts, clean))


def _checked(info: EngineInfo, request: EmbeddingRequest) -> tuple[EngineInfo, EmbeddingInfo]:
    """Return the descriptions of a model that can do what is asked.

    Raises: InvalidRequest: it has no vectors of this length, or no such prompt.  EngineNotReady.
    """
    if info.embedding is None:
        raise EngineNotReady("The model is still loading.")
    info.embedding.check_dimensions(request.dimensions)
    info.embedding.prompt(request.prompt_name, request.input_type)
    return info, info.embedding


def _described(name: str, encoded: EncodedInputs) -> dict[str, Any]:
    """Return what OpenTelemetry's conventions for GenAI have for a request for vectors."""
    return {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "llm_service",
        "gen_ai.request.model": name,
        "gen_ai.response.model": name,
        "gen_ai.usage.input_tokens": encoded.tokens,
    }


def _replaced(
    inputs: Sequence[str | tuple[int, ...]], texts: Sequence[str], clean: Sequence[str]
) -> tuple[str | tuple[int, ...], ...]:
    """Return each input, or its clean text where that is another."""
    return tuple(
        given if text == cleaned else cleaned for given, text, cleaned in zip(inputs, texts, clean, strict=True)
    )
