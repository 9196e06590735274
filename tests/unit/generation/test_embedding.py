"""EmbeddingService: rights, limits, filter, charge and log of a request for vectors, as of every other request."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import pytest

from app.embeddings import EmbeddingInfo, EmbeddingRequest
from app.engine.echo import EchoEngine
from app.engine.host import ModelHost
from app.engine.served_model import SamplingDefaults, Served, ServedEncoder, ServedModel
from app.errors import (
    AppError,
    DeadlineExceeded,
    Forbidden,
    InputTooLong,
    InvalidRequest,
    ModelNotFound,
    PiiBlocked,
    QuotaExceeded,
    ShuttingDown,
)
from app.generation.embedding import EmbeddingService
from app.langchain.chains import ModelChains
from app.langchain.embeddings import EngineEmbeddings
from app.privacy.filters import InputFilter
from app.privacy.redactor import Redactor
from app.requests import Origin
from app.telemetry import Metrics
from app.types import InferenceRecord
from tests.unit.generation.admission import FakeAdmission, ListLog, usage_recorder
from tests.unit.generation.services import ANNA
from tests.web.word_encoder import WordEncoder

EMAIL = "jane.doe@example.com"
_ids = count()


@dataclass
class Embedding:
    """A service, and the parts that a test looks at."""

    service: EmbeddingService
    host: ModelHost
    encoder: WordEncoder
    admission: FakeAdmission
    log: ListLog
    metrics: Metrics

    @property
    def row(self) -> InferenceRecord:
        (row,) = self.log.records
        return row


@asynccontextmanager
async def serving(
    encoder: WordEncoder | None = None, *, pii: Literal["mask", "block"] | None = None, **options: Any
) -> AsyncIterator[Embedding]:
    """Yield a service over a chat model that is the default one, and an encoder."""
    encoder, echo = encoder or WordEncoder("enc"), EchoEngine(model="chat")
    chains = ModelChains(echo, "chat", system="")
    chat = ServedModel(name="chat", engine=echo, chain=chains, defaults=SamplingDefaults(max_tokens=9))
    faces: Mapping[str, Served] = {
        "chat": chat,
        "enc": ServedEncoder(name="enc", engine=encoder, embeddings=EngineEmbeddings(embedder=encoder, model="enc")),
    }
    host = ModelHost(faces.__getitem__, "chat")
    for name in faces:
        await host.load(name)
    admission, log, metrics = FakeAdmission(), ListLog(), Metrics(list(faces))
    service = EmbeddingService(
        host=host,
        input_filter=None if pii is None else InputFilter(Redactor(), pii, lambda kind, count: None),
        metrics=metrics,
        admission=admission,
        usage=usage_recorder(log),
        **options,
    )
    yield Embedding(service, host, encoder, admission, log, metrics)
    await host.close()


def request_for(*inputs: str | tuple[int, ...], **fields: Any) -> EmbeddingRequest:
    defaults: dict[str, Any] = {
        "id": f"e{next(_ids)}",
        "tenant": ANNA.tenant,
        "origin": Origin(request_id="req", route="/v1/e"),
    }
    return EmbeddingRequest(inputs=inputs, **(defaults | fields))


async def test_a_request_is_checked_reserved_charged_logged_and_counted_by_its_tokens():
    async with serving() as each:
        embedded = await each.service.embed(request_for("one two", "three"), ANNA)

        assert (3, "enc", 2) == (embedded.prompt_tokens, embedded.model, len(embedded.vectors))
        assert [2] == each.admission.least_tokens
        assert "enc" == each.admission.checks[0]["model"]
        (reservation,) = each.admission.reservations
        assert (3, 3, True) == (reservation.tokens, reservation.committed, reservation.released)
        row = each.row
        assert ("enc", 3, 0, 3, 200) == (
            row.model,
            row.prompt_tokens,
            row.completion_tokens,
            row.charged_tokens,
            row.status,
        )
        assert ("req", "/v1/e", "one two\n\nthree", None) == (row.request_id, row.route, row.prompt, row.finish_reason)
        figures = each.metrics.render()[0].decode()
        assert 'prompt_tokens_total{model="enc"} 3.0' in figures
        assert 'texts_embedded_total{model="enc"} 2.0' in figures


async def test_personal_data_is_masked_before_the_model_reads_a_text():
    async with serving(pii="mask") as each:
        await each.service.embed(request_for(f"to {EMAIL} now", "nothing"), ANNA)
        assert ("to [EMAIL] now", "nothing") == each.encoder.requests[0].inputs
        assert EMAIL not in str(each.row.prompt)


async def test_personal_data_in_token_ids_is_masked_too():
    """Ids without any stay as they are."""
    async with serving(pii="mask") as each:
        harmless = tuple(map(ord, "hello you"))
        await each.service.embed(request_for(tuple(map(ord, f"to {EMAIL}")), harmless), ANNA)
        assert ("to [EMAIL]", harmless) == each.encoder.requests[0].inputs


async def test_personal_data_is_refused_where_the_policy_says_so():
    async with serving(pii="block") as each:
        with pytest.raises(PiiBlocked):
            await each.service.embed(request_for(f"to {EMAIL}"), ANNA)
        assert [] == each.encoder.requests
        assert (400, 0) == (each.row.status, each.row.charged_tokens)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (request_for("a", model="chat"), InvalidRequest),
        (request_for("a", model="absent"), ModelNotFound),
        (request_for("a", "b " * 41), InputTooLong),
        (request_for("a", dimensions=4000), InvalidRequest),
        (request_for("a", prompt_name="poem"), InvalidRequest),
        (request_for(" "), InvalidRequest),
    ],
)
async def test_a_request_that_cannot_be_served_costs_nothing(request_: EmbeddingRequest, error: type[AppError]):
    async with serving() as each:
        with pytest.raises(error):
            await each.service.embed(request_, ANNA)
        assert [] == each.admission.reservations
        assert [] == each.encoder.requests
        assert (error.status, 0) == (each.row.status, each.row.charged_tokens)


async def test_a_role_that_may_not_use_the_model_is_refused_before_a_text_is_read():
    async with serving() as each:
        each.admission.forbidden = Forbidden("no")
        with pytest.raises(Forbidden):
            await each.service.embed(request_for("a"), ANNA)
        assert [] == each.admission.least_tokens


async def test_a_quota_that_does_not_suffice_refuses_the_request():
    async with serving() as each:
        each.admission.exhausted = QuotaExceeded("none left")
        with pytest.raises(QuotaExceeded):
            await each.service.embed(request_for("a"), ANNA)
        assert [] == each.encoder.requests


async def test_a_client_that_hangs_up_pays_for_what_was_embedded():
    async with serving(WordEncoder("enc", seconds=60)) as each:
        request = request_for("one two", "three four five")
        working = asyncio.create_task(each.service.embed(request, ANNA))
        while not each.encoder.live:  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0)
        request.progress.computed = 2
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert {} == each.encoder.live
        assert (2, 499) == (each.row.charged_tokens, each.row.status)
        assert 2 == each.admission.reservations[0].committed
        assert 0 == each.admission.open


async def test_live_requests_end_when_the_grace_period_has():
    async with serving(WordEncoder("enc", seconds=60)) as each:
        working = asyncio.create_task(each.service.embed(request_for("one"), ANNA))
        while not each.encoder.live:  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0)
        await each.host.drain(0.01)
        with pytest.raises(ShuttingDown):
            await working
        with pytest.raises(ShuttingDown):
            await each.service.embed(request_for("one"), ANNA)


async def test_texts_that_take_too_long_to_prepare_are_given_up(monkeypatch: pytest.MonkeyPatch):
    async with serving(waiting_seconds=0.05) as each:

        async def slow(request: EmbeddingRequest) -> None:
            await asyncio.sleep(60)

        monkeypatch.setattr(each.encoder, "prepare_embedding", slow)
        with pytest.raises(DeadlineExceeded, match="took too long to prepare"):
            await each.service.embed(request_for("one"), ANNA)


async def test_a_model_that_embeds_and_generates_serves_a_request_that_names_it():
    """One that names none goes to the model that only embeds."""
    async with serving() as each:
        echo = each.host.find_generating("chat").engine
        both = WordEncoder("chat", info=EmbeddingInfo(dimension=3, max_tokens=5, pooling=("last",), normalized=True))
        await both.start()
        await each.host.unload("chat", 1)
        model = ServedModel(
            name="chat",
            engine=echo,
            chain=ModelChains(echo, "chat", system=""),
            defaults=SamplingDefaults(max_tokens=9),
            embeddings=EngineEmbeddings(embedder=both, model="chat"),
        )
        faces = {"chat": model}
        host = ModelHost(faces.__getitem__, "chat")
        await host.load("chat")
        named, chain = host.find_embedding(None)
        assert ("chat", model.embeddings) == (named.name, chain)
        await host.close()


async def test_the_status_names_each_encoder():
    async with serving() as each:
        assert {"enc": "ready"} == {name: str(figures["state"]) for name, figures in each.service.status().items()}
