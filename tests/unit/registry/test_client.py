"""What is read from a registry, and what is not believed."""

import asyncio
import contextlib
import gzip
import time
from typing import Any

import pytest

from app.errors import AppError, ModelNotFound, ModelRefused, RegistryUnavailable
from app.registry.client import MAX_JSON_BYTES, MlflowClient, RegistryServer
from app.registry.model_uri import parse_model_uri
from app.registry.version import ModelVersion, reported_metrics, reported_tags
from tests.unit.registry.stub import Registry, Reply, found


async def describe(server: RegistryServer, text: str = "models:/chat@production") -> ModelVersion:
    async with MlflowClient(server) as client:
        return await client.describe(parse_model_uri(text))


async def test_a_version_comes_with_what_people_want_to_know_of_it(registry: Registry, server: RegistryServer):
    """Metrics that are numbers, tags that people gave, and no tags of MLflow's own, which name users and paths."""
    registry.metrics = [{"key": "loss", "value": 1.5}, {"key": "broken", "value": "NaN"}]
    tags = [{"key": "team", "value": "search\n"}, {"key": "mlflow.user", "value": "root"}]
    registry.add("2", tags=tags, current_stage="Staging")
    registry.aliases["production"] = "2"

    expected = ModelVersion(
        name="chat",
        version="2",
        alias="production",
        stage="Staging",
        run_id="r1",
        metrics={"loss": 1.5},
        tags={"team": "search "},
    )
    assert expected == await describe(server)


async def test_a_name_without_an_alias_reports_none(registry: Registry, server: RegistryServer):
    registry.add("1", current_stage="None", run_id="")

    version = await describe(server, "models:/chat/1")

    assert (None, None, None, {}) == (version.alias, version.stage, version.run_id, version.metrics)


async def test_a_stage_means_its_latest_version(registry: Registry, server: RegistryServer):
    registry.add("2", current_stage="Production")

    version = await describe(server, "models:/chat/Production")

    assert ("2", "Production") == (version.version, version.stage)


async def test_a_model_whose_run_was_deleted_has_no_metrics(registry: Registry, server: RegistryServer):
    registry.replies["runs/get"] = lambda params: (404, {}, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}')

    assert {} == (await describe(server)).metrics


@pytest.mark.parametrize("text", ["models:/chat/9", "models:/chat@other", "models:/chat/Production"])
async def test_what_is_not_there_is_named(registry: Registry, server: RegistryServer, text: str):
    with pytest.raises(ModelNotFound, match="The registry has no "):
        await describe(server, text)


def _reply(status: int, content: bytes = b"{}", **headers: str) -> Reply:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, content


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (_reply(401), RegistryUnavailable, "refuses the credentials"),
        (_reply(403), RegistryUnavailable, "refuses the credentials"),
        (_reply(302, Location="http://169.254.169.254/"), RegistryUnavailable, "redirects"),
        (_reply(500), RegistryUnavailable, "status 500"),
        (_reply(400, b'{"error_code": "INVALID_PARAMETER_VALUE"}'), ModelNotFound, "has no models:/chat@production"),
        (_reply(404, b"<html>"), RegistryUnavailable, "status 404"),
        (_reply(200, b"<html>"), RegistryUnavailable, "not one of MLflow's"),
        (_reply(200, b"\xff"), RegistryUnavailable, "not one of MLflow's"),
        (_reply(200, b"[" * 100_000), RegistryUnavailable, "not one of MLflow's"),
        (_reply(200, b'{"model_version": {"name": 3}}'), RegistryUnavailable, "not one of MLflow's"),
        (_reply(200, b" " * (MAX_JSON_BYTES + 1)), RegistryUnavailable, "too long"),
        (_reply(200, gzip.compress(b"{}"), Content_Encoding="gzip"), RegistryUnavailable, "compresses"),
        (
            found(model_version={"name": "chat", "version": "2", "status": "PENDING_REGISTRATION"}),
            ModelRefused,
            "ready",
        ),
        (found(model_version={"name": "other", "version": "2"}), ModelRefused, "another model"),
        (found(model_version={"name": "chat", "version": "../2"}), ModelRefused, "another model"),
    ],
)
async def test_an_answer_that_cannot_be_used_is_an_error_of_ours(
    registry: Registry, server: RegistryServer, reply: Reply, error: type[AppError], words: str
):
    registry.replies["registered-models/alias"] = lambda params: reply

    with pytest.raises(error, match=words):
        await describe(server)

    assert 1 == len(registry.requests), "a redirect was followed"


async def test_a_registry_that_is_not_there_is_unavailable():
    with pytest.raises(RegistryUnavailable, match=r"cannot be reached \(ConnectError\)"):
        await describe(RegistryServer(tracking_uri="http://127.0.0.1:9"))


async def test_a_registry_that_sends_its_answer_in_drops_is_not_waited_for():
    """The limit is for the whole answer, not for each of its bytes."""

    ended = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()
        ended.set()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as dripping:
        port = dripping.sockets[0].getsockname()[1]
        started = time.monotonic()
        with pytest.raises(RegistryUnavailable, match="took too long"):
            await describe(RegistryServer(tracking_uri=f"http://127.0.0.1:{port}", timeout_seconds=0.3))
        assert time.monotonic() - started < 20  # all of its bytes take 50
        await ended.wait()


@pytest.mark.parametrize(
    ("credentials", "header"),
    [
        ({"username": "me", "password": "canary"}, "Basic bWU6Y2FuYXJ5"),
        ({"token": "canary"}, "Bearer canary"),
        ({"username": "me", "password": "canary", "token": "other"}, "Basic bWU6Y2FuYXJ5"),
        ({}, None),
    ],
)
async def test_credentials_are_sent_and_never_shown(
    registry: Registry,
    credentials: dict[str, Any],
    header: str | None,
    caplog: pytest.LogCaptureFixture,
):
    server = RegistryServer(tracking_uri=registry.address, **credentials)

    with caplog.at_level("DEBUG"):
        await describe(server)

    assert {header} == {headers.get("Authorization") for _, headers in registry.requests}
    assert "canary" not in repr(server) + caplog.text


async def test_a_long_description_is_cut():
    """A hundred metrics and tags, each of a length that fits a page."""
    assert 100 == len(reported_metrics((f"m{number}", 1.0) for number in range(1000)))
    tags = reported_tags((f"t{number}", "x" * 10_000) for number in range(1000))
    assert (100, 500) == (len(tags), max(map(len, tags.values())))
