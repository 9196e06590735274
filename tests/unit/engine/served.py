"""Served models whose chain adds no template, for tests below the chains."""

from collections.abc import AsyncGenerator

from app.engine.base import Engine
from app.engine.served_model import SamplingDefaults, ServedModel
from app.events import Event
from app.requests import GenerationRequest


class DirectChain:
    """Runs the engine on the prompt as it is."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def render(self, request: GenerationRequest) -> GenerationRequest:
        return request

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        return self._engine.stream(request)


def serve(name: str, engine: Engine) -> ServedModel:
    """Return a model that is served by this engine."""
    return ServedModel(name=name, engine=engine, chain=DirectChain(engine), defaults=SamplingDefaults(max_tokens=100))
