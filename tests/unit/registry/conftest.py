"""A registry with one version of the model `chat`, and a store of its models."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.registry.client import RegistryServer
from app.registry.downloader import Downloader
from app.registry.model_store import ModelStore
from tests.unit.registry.stub import Registry, serving


@pytest.fixture
def registry() -> Iterator[Registry]:
    with serving() as registry:
        registry.add("1")
        registry.aliases["production"] = "1"
        yield registry


@pytest.fixture
def server(registry: Registry) -> RegistryServer:
    return RegistryServer(tracking_uri=registry.address, timeout_seconds=5)


@pytest.fixture
def store(server: RegistryServer, tmp_path: Path) -> ModelStore:
    return ModelStore(server, tmp_path / "registry", Downloader(max_bytes=10**6, total_seconds=30))
