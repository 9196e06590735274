"""Reads an MLflow server over its REST API: which version a name means, and the files of a version.

Contacts the tracking URI and nothing else: it follows no redirect, and no address that a response names.  Uses no
package of MLflow, which would load models by unpickling them and running their code.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from app.errors import ModelNotFound, ModelRefused, RegistryUnavailable
from app.registry.model_uri import ModelUri
from app.registry.version import ModelVersion, reported_metrics, reported_tags

API = "api/2.0/mlflow/"
ARTIFACTS = "api/2.0/mlflow-artifacts/artifacts"
MAX_JSON_BYTES = 8 * 1024**2
CHUNK_BYTES = 1024**2
CONNECT_SECONDS = 10.0
READY = "READY"

_Reply = TypeVar("_Reply")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryServer:
    """Where the registry is, and how to speak to it; its representation holds no secret."""

    tracking_uri: str
    timeout_seconds: float = 30.0
    """For a response, and for each part of a file."""
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    """Sent as a bearer token; a username takes precedence, as in MLflow's own client."""

    @property
    def auth(self) -> httpx.Auth | None:
        if self.username is not None:
            return httpx.BasicAuth(self.username, self.password or "")
        return None if self.token is None else _Bearer(self.token)


class _Bearer(httpx.Auth):
    def __init__(self, token: str) -> None:
        self._header = f"Bearer {token}"

    def auth_flow(self, request: httpx.Request) -> Any:
        request.headers["Authorization"] = self._header
        yield request


class _Tag(msgspec.Struct):
    key: str
    value: str = ""


class _Metric(msgspec.Struct):
    key: str
    value: float | str = 0.0


class _Version(msgspec.Struct):
    name: str
    version: str
    status: str = READY
    current_stage: str | None = None
    run_id: str | None = None
    tags: tuple[_Tag, ...] = ()


class _VersionReply(msgspec.Struct):
    model_version: _Version


class _LatestReply(msgspec.Struct):
    model_versions: tuple[_Version, ...] = ()


class _SourceReply(msgspec.Struct):
    artifact_uri: str


class _RunData(msgspec.Struct):
    metrics: tuple[_Metric, ...] = ()


class _Run(msgspec.Struct):
    data: _RunData = msgspec.field(default_factory=_RunData)


class _RunReply(msgspec.Struct):
    run: _Run


class ArtifactInfo(msgspec.Struct, frozen=True):
    """An entry of a folder of files."""

    path: str
    is_dir: bool = False
    file_size: int | None = None


class _ArtifactReply(msgspec.Struct):
    files: tuple[ArtifactInfo, ...] = ()


class _ErrorReply(msgspec.Struct):
    error_code: str = ""


class MlflowClient:
    """An open connection to the server; close it."""

    def __init__(self, server: RegistryServer) -> None:
        self._server = server
        self._http = httpx.AsyncClient(
            base_url=server.tracking_uri.rstrip("/") + "/",
            auth=server.auth,
            headers={"Accept-Encoding": "identity"},
            timeout=httpx.Timeout(server.timeout_seconds, connect=min(CONNECT_SECONDS, server.timeout_seconds)),
            follow_redirects=False,
            verify=_certificates() if server.tracking_uri.startswith("https:") else False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.aclose()

    async def find_version(self, uri: ModelUri) -> str:
        """Return the number of the version that a name means now.

        Raises: as `describe`.
        """
        return (await self._find(uri)).version

    async def describe(self, uri: ModelUri) -> ModelVersion:
        """Return what the registry says of the version that a name means now.

        Raises: ModelNotFound: there is no such model, version or alias.  ModelRefused: it is not usable yet, or not
            described as MLflow does.  RegistryUnavailable: the server gave no answer, or refused the credentials.
        """
        found = await self._find(uri)
        stage = found.current_stage
        return ModelVersion(
            name=found.name,
            version=found.version,
            alias=uri.value if uri.kind == "alias" else None,
            stage=None if stage in (None, "", "None") else stage,
            run_id=found.run_id or None,
            metrics=await self._metrics(found.run_id),
            tags=reported_tags((tag.key, tag.value) for tag in found.tags),
        )

    async def artifact_uri(self, version: ModelVersion) -> str:
        """Return where the registry says that a version's files are.

        Raises: as `describe`.
        """
        named = {"name": version.name, "version": version.version}
        return (await self._get(f"{API}model-versions/get-download-uri", named, _SourceReply)).artifact_uri

    async def list_folder(self, folder: str) -> tuple[ArtifactInfo, ...]:
        """Return the entries of a folder of the server's artifact store; none of a folder that is not there.

        Raises: as `describe`.
        """
        return (await self._get(ARTIFACTS, {"path": folder}, _ArtifactReply)).files

    @asynccontextmanager
    async def open_file(self, path: str) -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
        """Open a file of the server's artifact store, to read it in chunks.

        Raises: as `describe`.
        """
        try:
            async with self._http.stream("GET", f"{ARTIFACTS}/{quote(path)}") as response:
                await self._refuse_failure(response)
                yield _chunks(response)
        except httpx.HTTPError as error:
            raise _unreachable(error) from None

    async def _find(self, uri: ModelUri) -> _Version:
        if uri.kind == "stage":
            named = {"name": uri.name, "stages": uri.value}
            latest = await self._get(f"{API}registered-models/get-latest-versions", named, _LatestReply)
            if not latest.model_versions:
                raise ModelNotFound(f"The registry has no version of {uri.name} in stage {uri.value}.")
            found = latest.model_versions[0]
        else:
            path = API + ("registered-models/alias" if uri.kind == "alias" else "model-versions/get")
            try:
                reply = await self._get(path, {"name": uri.name, uri.kind: uri.value}, _VersionReply)
            except ModelNotFound:
                raise ModelNotFound(f"The registry has no {uri}.") from None
            found = reply.model_version
        if found.status != READY:
            raise ModelRefused(f"{uri} is not ready in the registry.")
        if found.name != uri.name or not (found.version.isascii() and found.version.isdecimal()):
            raise ModelRefused(f"The registry answered with another model than {uri}.")
        return found

    async def _metrics(self, run_id: str | None) -> dict[str, float]:
        if not run_id:
            return {}
        try:
            reply = await self._get(f"{API}runs/get", {"run_id": run_id}, _RunReply)
        except ModelNotFound:  # a run may be deleted, and its model go on
            return {}
        return reported_metrics((metric.key, metric.value) for metric in reply.run.data.metrics)

    async def _get(self, path: str, params: Mapping[str, str], kind: type[_Reply]) -> _Reply:
        try:
            async with (
                asyncio.timeout(self._server.timeout_seconds),
                self._http.stream("GET", path, params=params) as response,
            ):
                await self._refuse_failure(response)
                return msgspec.json.decode(await _body(response), type=kind)
        except TimeoutError:
            raise RegistryUnavailable("The model registry took too long to answer.") from None
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise RegistryUnavailable("The model registry's answer is not one of MLflow's.") from None

    async def _refuse_failure(self, response: httpx.Response) -> None:
        """Raises: ModelNotFound, RegistryUnavailable: the status says that there is nothing to read."""
        status = response.status_code
        if status == 200:
            return
        if status in (400, 404) and await _error_code(response) in (
            "RESOURCE_DOES_NOT_EXIST",
            "INVALID_PARAMETER_VALUE",
        ):
            raise ModelNotFound("The registry has no such model, version or alias.")
        if status in (401, 403):
            raise RegistryUnavailable(
                "The model registry refuses the credentials (MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN)."
            )
        if 300 <= status < 400:
            raise RegistryUnavailable("The model registry redirects; set mlflow.tracking_uri to where it leads.")
        raise RegistryUnavailable(f"The model registry answered with status {status}.")


@cache
def _certificates() -> ssl.SSLContext:
    """Return the authorities that are trusted; reading them takes a while, and each client would do so."""
    return httpx.create_ssl_context()


async def _chunks(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    _refuse_encoding(response)
    async for chunk in response.aiter_raw(CHUNK_BYTES):
        yield chunk


async def _body(response: httpx.Response) -> bytes:
    """Raises: RegistryUnavailable: it is longer than any answer that is read."""
    _refuse_encoding(response)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise RegistryUnavailable("The model registry's answer is too long.")
    return bytes(body)


def _refuse_encoding(response: httpx.Response) -> None:
    # A few kilobytes can decompress to gigabytes; no compression was requested.
    if response.headers.get("content-encoding", "identity") != "identity":
        raise RegistryUnavailable("The model registry compresses what it was told to send as it is.")


async def _error_code(response: httpx.Response) -> str:
    try:
        return msgspec.json.decode(await _body(response), type=_ErrorReply).error_code
    except msgspec.DecodeError:
        return ""


def _unreachable(error: httpx.HTTPError) -> RegistryUnavailable:
    if isinstance(error, httpx.TimeoutException):
        return RegistryUnavailable("The model registry took too long to answer.")
    return RegistryUnavailable(f"The model registry cannot be reached ({type(error).__name__}).")
