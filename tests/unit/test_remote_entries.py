"""A remote engine as one of several models."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.config import Settings, load_settings
from app.config.model import ModelEntry
from app.errors import ConfigError
from app.main import create_app

SERVER = {"base_urls": ["http://127.0.0.1:9"]}
LOCAL = {"name": str(Path(__file__).parents[2] / "models" / "tiny-chat")}


def settings(tmp_path: Path, **sections: Any) -> Settings:
    fields = {"app": {"data_dir": str(tmp_path)}, "security": {"api_key": "a-key-of-the-test-0123"}, **sections}
    return load_settings("no-such-file.yml", None, **fields)


def test_a_model_beside_the_default_one_is_on_other_servers(tmp_path: Path):
    """Its own, or those of section `remote`."""
    own = {"name": "big", "engine": "remote", "preload": True, "remote": SERVER}
    shared = {"name": "large", "engine": "remote", "preload": True}
    app = create_app(settings(tmp_path, model=LOCAL, models=[own, shared], remote=SERVER))

    models = app.state.container.host.models
    assert [("tiny-chat", 0), ("big", 1), ("large", 1)] == [
        (each.name, len(each.engine.status().upstreams)) for each in models
    ]


def test_a_model_beside_a_remote_one_is_local_unless_it_says_otherwise(tmp_path: Path):
    given = settings(tmp_path, model={"name": "big", "engine": "remote"}, remote=SERVER, models=[LOCAL])

    assert "auto" == given.models[0].config(given.model).engine


def test_a_remote_model_without_a_server_stops_the_start(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"remote.base_urls: the engine of big is remote, and no server is named"):
        create_app(settings(tmp_path, model=LOCAL, models=[{"name": "big", "engine": "remote", "preload": True}]))


def test_servers_of_a_model_that_is_not_remote_are_refused():
    with pytest.raises(ValidationError, match="remote needs engine: remote"):
        ModelEntry.model_validate({"name": "big", "remote": SERVER})
