"""Models of a registry come and go with their aliases; the registry is a stub on a real socket, downloads are real."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.config import ModelConfig
from app.engine.alias_follower import AliasFollower
from app.engine.host import ModelHost
from app.engine.model_loader import ModelLoader
from app.engine.model_source import LoadSpec
from app.engine.probe import PromptProbe
from app.engine.registered_models import RegisteredModels
from app.engine.served_model import ServedModel
from app.errors import ModelLoadFailed, ModelNotFound, ModelRefused, RegistryUnavailable
from app.registry.client import RegistryServer
from app.registry.downloader import Downloader
from app.registry.model_store import ModelStore
from app.registry.model_uri import parse_model_uri
from tests.unit.engine.served import serve
from tests.unit.registry.fetching_engine import FetchingEngine
from tests.unit.registry.stub import Registry, Reply, serving
from tests.waiting import HANG_SECONDS, until

PRODUCTION = "models:/chat@production"
POLL_SECONDS = 0.05


@pytest.fixture
def registry() -> Iterator[Registry]:
    with serving() as registry:
        registry.add("1")
        registry.aliases["production"] = "1"
        yield registry


def registered(registry: Registry, folder: Path) -> RegisteredModels:
    server = RegistryServer(tracking_uri=registry.address, timeout_seconds=5)
    return RegisteredModels(ModelStore(server, folder, Downloader(max_bytes=10**6, total_seconds=30)))


class Hosted:
    """A host with one model of the registry, whose name is followed."""

    def __init__(self, models: RegisteredModels, uri: str) -> None:
        self.models = models
        self.spec = LoadSpec(name="chat", config=ModelConfig(name=uri, source="mlflow"))
        self.host = ModelHost(lambda name: self._build(self.spec), default="chat")
        self.loader = ModelLoader(self.host, self._build, ModelConfig(unload_grace_seconds=5))
        self.engines: list[FetchingEngine] = []
        probe = PromptProbe("Hello", max_tokens=4, seconds=5)
        self.follower = AliasFollower(models, self.loader, self.host, poll_seconds=POLL_SECONDS, probe=probe)

    def _build(self, spec: LoadSpec) -> ServedModel:
        self.engines.append(FetchingEngine(spec.name, spec.config.name, self.models.fetch))
        return serve(spec.name, self.engines[-1])

    @property
    def facts(self) -> Any:
        return self.models.facts(self.host.find("chat").engine.info.revision)

    async def until(self, wanted: Callable[[Any], bool]) -> None:
        async with asyncio.timeout(HANG_SECONDS):
            while not wanted(self.facts):  # noqa: ASYNC110  # another task's work
                await asyncio.sleep(0.02)

    async def polls(self, registry: Registry, count: int = 2) -> None:
        """Wait until the alias has been looked up so often again."""
        before = looks(registry)
        while looks(registry) < before + count:  # noqa: ASYNC110  # another task's work
            await asyncio.sleep(0.02)


def looks(registry: Registry) -> int:
    return sum(path.endswith("registered-models/alias") for path, _ in registry.requests)


@asynccontextmanager
async def hosted(models: RegisteredModels, uri: str = PRODUCTION) -> AsyncIterator[Hosted]:
    found = Hosted(models, uri)
    await found.loader.load(found.spec).wait()
    following = asyncio.create_task(found.follower.watch())
    try:
        yield found
    finally:
        following.cancel()
        await asyncio.wait([following])
        await found.loader.close()
        await found.host.close()


def folders(folder: Path) -> set[str]:
    """Return the versions whose files are here."""
    return {path.name for path in folder.glob("*/chat/*") if path.is_dir()}


async def test_a_new_version_takes_over_and_the_files_of_the_old_one_are_removed(registry: Registry, tmp_path: Path):
    """What the registry says of the new one is reported; the old model is closed."""
    async with hosted(registered(registry, tmp_path)) as model:
        registry.add("2", tags=[{"key": "team", "value": "search"}])
        registry.aliases["production"] = "2"
        await model.until(lambda facts: facts["version"] == "2")

        assert ({"team": "search"}, "production", None) == tuple(
            model.facts[name] for name in ("tags", "alias", "refused_version")
        )
        async with asyncio.timeout(HANG_SECONDS):
            while folders(tmp_path) != {"2"}:  # noqa: ASYNC110  # another task's work
                await asyncio.sleep(0.02)
        assert 2 == len(model.engines)
        assert model.engines[1].progress[-1].bytes_done == model.engines[1].progress[-1].bytes_total

    assert {"2"} == folders(tmp_path)


def _refused_by_name(registry: Registry) -> None:
    registry.files["MLmodel"] = b"flavors: {sklearn: {}}"


def _failing_the_probe(registry: Registry) -> None:
    registry.files["model/config.json"] = b"fail"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_refused_by_name, "this model has 'sklearn'"),
        (_failing_the_probe, "The model fails mlflow.probe_prompt: The model's logits are not finite"),
    ],
)
async def test_a_version_that_fails_stays_out_and_is_tried_once(
    registry: Registry, tmp_path: Path, damage: Callable[[Registry], None], words: str
):
    """The old one serves on, after a restart too; a later version is tried again."""
    sound = dict(registry.files)
    async with hosted(registered(registry, tmp_path)) as model:
        damage(registry)
        registry.add("2")
        registry.aliases["production"] = "2"
        await model.until(lambda facts: facts["refused_version"] == "2")
        await model.polls(registry)

        assert "1" == model.facts["version"]
        assert words in model.loader.failures["chat"].message
        assert 2 == len(model.engines)
        assert {"1"} == folders(tmp_path)

    async with hosted(registered(registry, tmp_path)) as model:
        await model.until(lambda facts: facts["refused_version"] == "2")
        await model.polls(registry)
        assert ("1", 1) == (model.facts["version"], len(model.engines))

        registry.files = sound
        registry.add("3")
        registry.aliases["production"] = "3"
        await model.until(lambda facts: facts["version"] == "3")
        assert model.facts["refused_version"] is None


async def test_a_version_that_failed_is_tried_again_once_the_alias_had_left_it(registry: Registry, tmp_path: Path):
    sound = dict(registry.files)
    async with hosted(registered(registry, tmp_path)) as model:
        _refused_by_name(registry)
        registry.add("2")
        registry.aliases["production"] = "2"
        await model.until(lambda facts: facts["refused_version"] == "2")
        registry.aliases["production"] = "1"
        await model.until(lambda facts: facts["refused_version"] is None)

        registry.files = sound
        registry.aliases["production"] = "2"
        await model.until(lambda facts: facts["version"] == "2")


async def test_a_registry_that_is_down_ends_nothing_and_is_logged_once(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Once it is back, what it says is followed; a download that failed for it is tried again."""
    async with hosted(registered(registry, tmp_path)) as model:
        await model.polls(registry, 1)
        registry.replies["registered-models/alias"] = lambda params: (503, {}, b"")
        await model.polls(registry, 3)
        assert 1 == caplog.text.count("The model registry answered with status 503. It is tried again.")
        assert "1" == model.facts["version"]

        registry.add("2")
        registry.aliases["production"] = "2"
        registry.replies = {"/model.safetensors": lambda params: (503, {}, b"")}
        async with asyncio.timeout(HANG_SECONDS):
            while "chat" not in model.loader.failures:  # noqa: ASYNC110  # another task's work
                await asyncio.sleep(0.02)
        registry.replies = {}
        await model.until(lambda facts: facts["version"] == "2")


async def test_without_the_registry_the_last_version_serves(registry: Registry, tmp_path: Path):
    """One that has never served cannot."""
    async with hosted(registered(registry, tmp_path)) as model:
        await model.polls(registry)
    registry.replies[""] = lambda params: (500, {}, b"")

    async with hosted(registered(registry, tmp_path)) as model:
        assert "1" == model.facts["version"]

    with pytest.raises(RegistryUnavailable, match="status 500"):
        await registered(registry, tmp_path).fetch("models:/other@production", lambda progress: None)


async def test_a_number_is_not_followed(registry: Registry, tmp_path: Path):
    async with hosted(registered(registry, tmp_path), "models:/chat/1") as model:
        registry.add("2")
        await asyncio.sleep(4 * POLL_SECONDS)

        assert ("1", 0, 1) == (model.facts["version"], looks(registry), len(model.engines))


async def test_files_that_another_model_uses_stay_until_it_is_gone(registry: Registry, tmp_path: Path):
    models = registered(registry, tmp_path)
    pinned = await models.fetch("models:/chat/1", lambda progress: None)
    async with hosted(models) as model:
        registry.add("2")
        registry.aliases["production"] = "2"
        await model.until(lambda facts: facts["version"] == "2")
        await model.polls(registry)
        assert {"1", "2"} == folders(tmp_path)

        await pinned.release()
        assert {"2"} == folders(tmp_path)


async def test_files_that_are_fetched_while_they_are_to_be_removed_stay_until_they_are_released(
    registry: Registry, tmp_path: Path
):
    """As where an alias leaves a version that another model is being loaded from."""
    may_go_on = threading.Event()

    def slow(params: Mapping[str, str]) -> Reply:
        may_go_on.wait(HANG_SECONDS)
        return 200, {}, registry.files["model/model.safetensors"]

    registry.replies["/model.safetensors"] = slow
    models = registered(registry, tmp_path)
    fetching = asyncio.create_task(models.fetch("models:/chat/1", lambda progress: None))
    await until(lambda: any(path.endswith("/model.safetensors") for path, _ in registry.requests))
    removing = asyncio.create_task(models.refuse(parse_model_uri(PRODUCTION), "1", "It failed."))
    await until(lambda: bool(list(tmp_path.glob("*/chat/alias-*.json"))))
    await asyncio.sleep(0.1)
    may_go_on.set()
    fetched = await fetching
    await removing
    assert (fetched.folder / "model.safetensors").is_file()

    await fetched.release()
    assert not fetched.folder.exists()


async def test_a_version_that_was_copied_to_another_model_is_not_taken_for_that_one(registry: Registry, tmp_path: Path):
    """It has the same number and the same files; each model is reported and removed by its own name."""
    registry.copies.add("staging")
    models = registered(registry, tmp_path)
    async with hosted(models, "models:/chat@production") as model:
        copy = await models.fetch("models:/staging/1", lambda progress: None)
        copied = models.facts(copy.revision)
        assert copied is not None
        assert ("chat", "staging") == (model.facts["name"], copied["name"])

        registry.add("2")
        registry.aliases["production"] = "2"
        await model.until(lambda facts: facts["version"] == "2")
        await model.polls(registry)

        assert copy.folder.is_dir()
        assert {"2"} == folders(tmp_path)


@pytest.mark.parametrize(
    ("uri", "error", "message", "reason"),
    [
        (
            "models:/chat/9",
            ModelNotFound,
            "the registry has no models:/chat/9.",
            "not_found",
        ),
        (
            "s3://bucket",
            ModelRefused,
            "its name must be models:/name/version",
            "unsupported",
        ),
    ],
)
async def test_what_cannot_be_fetched_says_why(
    registry: Registry, tmp_path: Path, uri: str, error: type[Exception], message: str, reason: str
):
    with pytest.raises(error) as refused:
        await registered(registry, tmp_path).fetch(uri, lambda progress: None)

    assert str(refused.value).startswith(f"The model cannot be loaded: {message}")
    assert reason == refused.value.details["reason"]  # type: ignore[attr-defined]


async def test_a_failed_load_is_that_of_the_registry(registry: Registry, tmp_path: Path):
    """The loader reports it as an error of its caller's, with the reason in a word."""
    registry.files["MLmodel"] = b"flavors: {sklearn: {}}"
    model = Hosted(registered(registry, tmp_path), PRODUCTION)

    with pytest.raises(ModelLoadFailed, match="only the flavor transformers") as refused:
        await model.loader.load(model.spec).wait()

    assert "unsupported" == refused.value.details["reason"]
    await model.loader.close()
