"""The probe of a new version: a prompt has to be completed, in time and with finite scores."""

import math

import pytest

from app.engine.probe import PromptProbe
from app.engine.served_model import ServedEncoder
from app.errors import EngineFailed, ModelLoadFailed, ShuttingDown
from app.events import Delta, DetokenizedLogprob
from app.langchain.embeddings import EngineEmbeddings
from app.types import FinishReason
from tests.unit.engine.scripted import ScriptedEngine
from tests.unit.engine.served import serve
from tests.web.word_encoder import WordEncoder

PROBE = PromptProbe("Hello", max_tokens=4, seconds=5)


async def test_a_model_that_completes_the_prompt_passes():
    """It is requested greedily, past the cache, with the log-probability of each token."""
    engine = ScriptedEngine("a", "b").run_freely()

    await PROBE(serve("chat", engine))

    [request] = engine.requests
    assert ("Hello", 4, 0.0, False) == (
        request.text,
        request.sampling.max_tokens,
        request.sampling.temperature,
        request.cache,
    )
    assert [] == engine.live


async def test_an_encoder_has_nothing_to_complete():
    encoder = WordEncoder("words")

    await PROBE(ServedEncoder(name="words", engine=encoder, embeddings=EngineEmbeddings(embedder=encoder, model="w")))


def _scored(logprob: float) -> Delta:
    return Delta(text="a", tokens=1, logprobs=(DetokenizedLogprob(text="a", raw=b"a", logprob=logprob),))


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (ScriptedEngine(_scored(math.nan)), "its log-probabilities are not finite"),
        (ScriptedEngine(_scored(-math.inf)), "its log-probabilities are not finite"),
        (ScriptedEngine("a", error=EngineFailed("The worker died.")), "The worker died"),
        (ScriptedEngine(error=EngineFailed("The worker died.")), "The worker died"),
        (ScriptedEngine("a", end=FinishReason.ABORT), "it was not completed"),
    ],
)
async def test_a_model_that_does_not_complete_it_fails(engine: ScriptedEngine, words: str):
    with pytest.raises(ModelLoadFailed, match=f"^The model fails mlflow.probe_prompt: {words}"):
        await PROBE(serve("chat", engine.run_freely()))

    assert [] == engine.live


async def test_a_model_that_takes_too_long_fails():
    engine = ScriptedEngine("a")

    with pytest.raises(ModelLoadFailed, match=r"it took more than 0.1 s"):
        await PromptProbe("Hello", max_tokens=4, seconds=0.1)(serve("chat", engine))

    assert [] == engine.live


async def test_a_service_that_stops_proves_nothing_about_a_model():
    """The version is then tried again at the next start."""

    engine = ScriptedEngine(error=ShuttingDown()).run_freely()

    with pytest.raises(ShuttingDown):
        await PROBE(serve("chat", engine))
