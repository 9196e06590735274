"""Generation services around an engine of the test, built of the same parts as the application's."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from app.config import ChatHistoryConfig
from app.engine.base import Engine
from app.engine.cache import CachedEngine
from app.engine.host import ModelHost
from app.engine.served_model import SamplingDefaults, ServedModel
from app.events import Event
from app.generation.service import GenerationService
from app.generation.sessions import MemorySessionStore
from app.langchain.chains import ModelChains
from app.privacy.filters import InputFilter
from app.requests import GenerationRequest
from app.telemetry import Metrics
from app.types import Message, Principal, Role, SamplingParams, Tenant
from tests.unit.event_streams import read
from tests.unit.generation.admission import FakeAdmission, ListLog, usage_recorder

ANNA, BERT = Principal("a", Tenant.owner("anna")), Principal("b", Tenant.owner("bert"))
SYSTEM = "sys"
"""The system prompt of every model."""
MODEL = "echo"

_ids = count()


@dataclass
class Service:
    """A service, and the parts that a test looks at."""

    service: GenerationService
    admission: FakeAdmission
    log: ListLog
    metrics: Metrics
    sessions: MemorySessionStore | None
    principal: Principal = ANNA
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.engine = self.host.default.engine

    @property
    def host(self) -> ModelHost:
        return self.service.host

    def generate(self, request: GenerationRequest) -> Any:
        """Return the events of a request of the principal that it names as its tenant."""
        principal = BERT if request.tenant == BERT.tenant else self.principal
        return self.service.generate(request, principal)

    async def read(self, request: GenerationRequest) -> list[Event]:
        return await read(self.generate(request))

    async def turns(self, tenant: Tenant, session_id: str) -> list[list[str]]:
        """Return the texts of a session, turn by turn."""
        assert self.sessions is not None
        session = await self.sessions.read(tenant, session_id)
        return [[message.content for message in turn.messages] for turn in session.turns] if session else []


@asynccontextmanager
async def serving(
    engine: Engine,
    *,
    cache: CachedEngine | None = None,
    input_filter: InputFilter | None = None,
    storage_filter: InputFilter | None = None,
    completion: str = "{prompt}",
    system: str = SYSTEM,
    sessions: bool = True,
    max_turns: int = 50,
    defaults: SamplingDefaults | None = None,
    waiting_seconds: float = 30,
    **usage: Any,
) -> AsyncIterator[Service]:
    """Yield a service over an engine that is ready.

    Args:
        engine: the outermost one, in whatever wrappers.
        cache: one of those, for the status.
        storage_filter: the input filter if None.
        system, completion: the model's templates.
        usage: what a replayed response costs, and whether texts are logged.
    """
    admission, log, metrics = FakeAdmission(), ListLog(), Metrics([MODEL])
    model = ServedModel(
        name=MODEL,
        engine=engine,
        chain=ModelChains(engine, MODEL, system=system, completion=completion),
        defaults=defaults or SamplingDefaults(max_tokens=100),
        cache=cache,
    )
    host = ModelHost(lambda name: model, MODEL)
    await host.load(MODEL)
    await engine.wait_ready()
    store = MemorySessionStore(ChatHistoryConfig(max_turns=max_turns)) if sessions else None
    service = GenerationService(
        host=host,
        input_filter=input_filter,
        storage_filter=storage_filter or input_filter,
        sessions=store,
        metrics=metrics,
        admission=admission,
        usage=usage_recorder(log, **usage),
        waiting_seconds=waiting_seconds,
    )
    yield Service(service=service, admission=admission, log=log, metrics=metrics, sessions=store)
    await host.close()


def complete(prompt: str | tuple[int, ...], **fields: Any) -> GenerationRequest:
    """Return a request to continue a text or tokens; `fields` are its own or those of its sampling parameters."""
    prompts = {"text": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}
    return _request(**prompts, **fields)


def chat(*texts: str, system: str | None = None, **fields: Any) -> GenerationRequest:
    """Return a request to answer a chat in which user and assistant take turns, the user first.

    Args: fields: as of `complete`; `messages` take the place of the texts.
    """
    roles = (Role.USER, Role.ASSISTANT)
    messages = [Message(roles[index % 2], text) for index, text in enumerate(texts)]
    if system is not None:
        messages.insert(0, Message(Role.SYSTEM, system))
    return _request(**{"messages": tuple(messages), **fields})


_SAMPLING = frozenset(SamplingParams.__dataclass_fields__)


def _request(**fields: Any) -> GenerationRequest:
    given = {name: fields.pop(name) for name in _SAMPLING & fields.keys()}
    unset = frozenset(_SAMPLING - given.keys() - {"sample"})
    defaults: dict[str, Any] = {"id": f"r{next(_ids)}", "tenant": ANNA.tenant, "unset": unset}
    return GenerationRequest(**defaults | fields, sampling=SamplingParams(**given))
