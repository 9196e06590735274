"""Variables and configuration files of older services: what they mean here, and that the service's own names win."""

from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from app.config import Settings, load_settings
from app.config.older_names import OLDER_VARIABLES
from app.errors import ConfigError
from app.server import warn_of_workers

KEY = "a-key-of-an-older-service"
VARIABLES = {
    "API_KEY": KEY,
    "API_HOST": "127.0.0.5",
    "API_PORT": "18222",
    "API_WORKERS": "4",
    "LOG_LEVEL": "debug",
    "MODEL_NAME": "distilgpt2",
}

Load = Callable[..., Settings]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load settings with variables in the environment, and texts of .env and config.yml."""

    def load(environment: dict[str, str] | None = None, *, dotenv: str = "", yaml: str = "") -> Settings:
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        (tmp_path / ".env").write_text(dotenv)
        (tmp_path / "config.yml").write_text(yaml)
        return load_settings(tmp_path / "config.yml", tmp_path / ".env")

    return load


def values(settings: Settings) -> tuple[object, ...]:
    key = settings.security.api_key
    return (
        key and key.get_secret_value(),
        settings.app.host,
        settings.app.port,
        settings.compat.workers,
        settings.logging.level,
        settings.model.name,
        settings.model.source,
    )


MEANT = (KEY, "127.0.0.5", 18222, 4, "DEBUG", "distilgpt2", "hub")


def test_older_variables_of_the_environment_are_read(load: Load):
    assert MEANT == values(load(VARIABLES))


def test_older_variables_of_dotenv_are_read(load: Load):
    assert MEANT == values(load(dotenv="".join(f"{name}={value}\n" for name, value in VARIABLES.items())))


def test_older_variables_win_over_the_file(load: Load):
    yaml = "app: {host: 127.0.0.9, port: 1}\nmodel: {name: other, source: local}\nlogging: {level: ERROR}\n"

    assert MEANT == values(load(VARIABLES, yaml=yaml))


def test_the_services_own_names_win_wherever_they_stand(load: Load):
    own = "SECURITY__API_KEY=my-own-key-0123\nAPP__HOST=127.0.0.2\nAPP__PORT=2\nCOMPAT__WORKERS=1\n"
    own += "LOGGING__LEVEL=ERROR\nMODEL__NAME=models/mine\n"

    # MODEL_NAME brings its own source, which must not become that of another model.
    assert ("my-own-key-0123", "127.0.0.2", 2, 1, "ERROR", "models/mine", "local") == values(
        load(VARIABLES, dotenv=own)
    )


def test_a_model_that_is_a_folder_is_local(load: Load, tmp_path: Path):
    model = load({"MODEL_NAME": str(tmp_path)}).model

    assert (str(tmp_path), "local") == (model.name, model.source)


@pytest.mark.parametrize(
    ("environment", "dotenv"),
    [
        ({"MODEL_NAME": "chat", "MLFLOW_TRACKING_URI": "http://localhost:5000"}, ""),
        ({"MODEL_NAME": "chat"}, "MLFLOW_TRACKING_URI=http://localhost:5000"),
        ({"MODEL_NAME": "models:/chat/Production"}, "MLFLOW__TRACKING_URI=http://localhost:5000"),
    ],
)
def test_beside_a_registry_a_model_is_its_production_version(load: Load, environment, dotenv):
    settings = load(environment, dotenv=dotenv)

    assert ("mlflow", "models:/chat/Production") == (settings.model.source, settings.model.name)
    assert ("chat", "http://localhost:5000") == (settings.model.public_name, settings.where_registry)


@pytest.mark.parametrize(
    ("environment", "level"),
    [
        ({"DEBUG": "true"}, "DEBUG"),
        ({"DEBUG": "true", "LOG_LEVEL": "WARN"}, "WARNING"),
        ({"DEBUG": "false"}, "INFO"),
        ({"DEBUG": "express:*"}, "INFO"),
        ({"LOG_LEVEL": "critical"}, "ERROR"),
    ],
)
def test_levels_of_logging_are_read_as_other_programs_write_them(load: Load, environment, level):
    assert level == load(environment).logging.level


def test_an_empty_variable_says_nothing(load: Load):
    assert values(load()) == values(load(dict.fromkeys(OLDER_VARIABLES, "")))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"API_KEY": "your-secret-api-key"}, "security.api_key: this is a published example"),
        ({"API_PORT": "many"}, "app.port: Input should be a valid integer"),
        ({"LOG_LEVEL": "loud"}, "logging.level: Input should be"),
    ],
)
def test_a_wrong_value_stops_the_start_as_that_of_the_newer_name_would(load: Load, environment, reason):
    with pytest.raises(ConfigError, match=reason):
        load(environment)


def test_the_file_of_an_older_service_is_understood(load: Load):
    """It has a section `api`, in which no file of this service is written."""
    yaml = """
api: {host: "127.0.0.5", port: 8001, workers: 2}
model: {max_tokens: 1024, default_max_length: 60, batch_size: 4}
mlflow: {tracking_uri: "http://localhost:5000", model_name: custom-llm, model_stage: Staging}
logging: {level: WARNING}
"""
    settings = load(yaml=yaml)

    assert ("127.0.0.5", 8001, 2) == (settings.app.host, settings.app.port, settings.compat.workers)
    assert (1024, 60) == (settings.compat.predict_most_length, settings.compat.predict_max_length)
    assert ("mlflow", "models:/custom-llm/Staging") == (settings.model.source, settings.model.name)
    assert "http://localhost:5000" == settings.where_registry
    assert (4, 512, "WARNING") == (settings.model.max_batch_size, settings.model.max_tokens, settings.logging.level)


def test_an_unknown_key_of_such_a_file_still_stops_the_start(load: Load):
    with pytest.raises(ConfigError, match=r"api\.hots: there is no such key|api: there is no such key"):
        load(yaml="api: {hots: x}")


def test_with_redis_as_many_processes_serve_unless_our_own_name_says_how_many(load: Load):
    redis = "redis: {url: 'redis://h'}\n"

    assert 4 == load({"API_WORKERS": "4"}, yaml=redis).workers
    assert 2 == load({"API_WORKERS": "4", "APP__WORKERS": "2"}, yaml=redis).workers
    assert 2 == load(yaml=redis + "api: {workers: 2}").workers


def test_more_than_one_worker_is_warned_about_and_one_is_not(load: Load):
    with structlog.testing.capture_logs() as lines:
        warn_of_workers(load())
        warn_of_workers(load({"API_WORKERS": "4"}))

    assert ["warning"] == [line["log_level"] for line in lines]
    assert 1 == load({"API_WORKERS": "4"}).workers
