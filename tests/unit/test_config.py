"""Settings: where they come from, what is refused and what the files in the repository promise."""

import os
import re
from base64 import b64encode
from pathlib import Path

import pytest

from app.config import Section, Settings, load_settings
from app.config.variables import unread_variables
from app.errors import ConfigError
from scripts.env_example import env_example

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of this machine reaches a test."""
    for name in list(os.environ):
        if "__" in name or name in ("HF_TOKEN", "HUGGINGFACE_TOKEN", "LANGSMITH") or name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "config.yml", tmp_path / ".env"


def test_the_environment_wins_over_dotenv_and_dotenv_over_yaml(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value is taken from the strongest source that names it."""
    config, env = files
    config.write_text("model: {name: from-yaml, max_tokens: 1, temperature: 0.1}")
    env.write_text("MODEL__MAX_TOKENS=2\nMODEL__TEMPERATURE=0.2\n")
    monkeypatch.setenv("MODEL__TEMPERATURE", "0.3")

    model = load_settings(config, env).model

    assert ("from-yaml", 2, 0.3) == (model.name, model.max_tokens, model.temperature)


def test_without_any_file_the_defaults_serve_the_embedded_model(files: tuple[Path, Path]) -> None:
    """A missing config.yml and .env leave the defaults."""
    settings = load_settings(*files)

    assert ("local", "models/tiny-chat") == (settings.model.source, settings.model.name)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("model: {nmae: x}", "model.nmae: there is no such key"),
        ("modle: {name: x}", "modle: there is no such key"),
        ("app: {port: 70000}", "app.port: Input should be less than or equal to 65535"),
        ("app: {trusted_proxies: ['*']}", "app.trusted_proxies: '*' would let any client forge its address"),
        ("app: {trusted_proxies: ['0.0.0.0/0']}", "app.trusted_proxies: entry 1 holds addresses of any client"),
        ("app: {trusted_proxies: ['10.0.0.1', '::/0']}", "app.trusted_proxies: entry 2 holds addresses of any client"),
        ("app: {trusted_proxies: ['128.0.0.0/1']}", "app.trusted_proxies: entry 1 holds addresses of any client"),
        ("app: {trusted_proxies: ['::ffff:0.0.0.0/96']}", "app.trusted_proxies: entry 1 holds addresses of any client"),
        ("app: {trusted_proxies: ['proxy.local']}", "app.trusted_proxies: entry 1 is no IP address"),
        ("app: {trusted_proxies: ['10.0.0.1/8']}", "app.trusted_proxies: entry 1 is no IP address and no network"),
        ("model: {4111111111111111: x}", "model.(a name that is not shown): there is no such key"),
        ("sk-a1b2c3: x", "(a name that is not shown): there is no such key"),
        ("model: {temperature: .nan}", "model.temperature: Input should be a finite number"),
        ("models: [{name: a/b, trust_remote_code: true}]", "models.0.trust_remote_code: there is no such key"),
        ("model: {trust_remote_code: true}", "model.trust_remote_code: there is no such key"),
        ("models: [{name: a/b, served_name: ../x}]", "models.0.served_name"),
        ("adapters: {preload: [{name: ../x, source: a}]}", "adapters.preload.0.name"),
        ("model: 3", "model: Input should be a valid dictionary"),
        ("model: [1", "line 1 is not valid YAML"),
        ("- a list", "must hold sections"),
        ("security: {cors_origins: ['*']}", "security.cors_origins: '*' would let every web page call"),
        ("security: {api_key: change-me-in-env}", "security.api_key: this is a published example"),
        ("security: {api_key: short}", "security.api_key: an API key needs 8 to 512 letters"),
        ("security: {api_key: with a space}", "security.api_key: an API key needs 8 to 512 letters"),
        ("pii: {entities: [mail]}", "pii.entities.0: Input should be 'email'"),
        ("rate_limit: {requests_per_minute: -1}", "rate_limit.requests_per_minute"),
        ("redis: {encryption_key: canary}", "redis.encryption_key: a key is 32 random bytes in base64"),
        ("redis: {encryption_key: 'QUFB'}", "redis.encryption_key: a key is 32 random bytes in base64"),
        ("mlflow: {tracking_uri: 'sqlite:///x'}", "mlflow.tracking_uri: must begin with http:// or https://"),
        ("mlflow: {tracking_uri: '/var/mlruns'}", "mlflow.tracking_uri: must begin with http:// or https://"),
        ("mlflow: {tracking_uri: 'http://me:pw@server'}", "mlflow.tracking_uri: must hold no name or password"),
        ("mlflow: {tracking_uri: 'http://server/?x=1'}", "mlflow.tracking_uri: must be an address without ?"),
        ("mlflow: {tracking_uri: 'http://server:99999'}", "mlflow.tracking_uri: this is no address"),
    ],
)
def test_a_wrong_configuration_stops_the_start_with_key_and_reason(
    files: tuple[Path, Path], yaml: str, message: str
) -> None:
    """The message names the key and says what is wrong with it."""
    files[0].write_text(yaml)

    with pytest.raises(ConfigError, match=re.escape(message)):
        load_settings(*files)


@pytest.mark.parametrize("proxies", [["10.0.0.0/8", "fc00::/7", "127.0.0.1", "::1", "::ffff:10.0.0.0/104"], []])
def test_private_networks_may_be_proxies(files: tuple[Path, Path], proxies: list[str]) -> None:
    """The widest of them, in either notation."""
    assert tuple(proxies) == load_settings(*files, app={"trusted_proxies": proxies}).app.trusted_proxies


@pytest.mark.parametrize(
    ("yaml", "env"),
    [
        ("security: {canary4111: x}", ""),
        ("canary-1: x", ""),
        ("security:\n  CANARY_KEY_1234: x", ""),
        ("security: {api_key canary: x}", ""),
        ("security: {cors_origins: {canary: x}}", ""),
        ("pii: {entities: [canary]}", ""),
        ("app: {trusted_proxies: [canary]}", ""),
        ("app: {port: canary}", ""),
        ("database: {url: [canary]}", ""),
        ("", "SECURITY__CANARY1=x"),
        ("", "SECRUITY__CANARY1=x"),
        ("", "SECURITY__API_KEY=canary"),
        ("", "SECURITY={canary"),
        ("", "APP__TRUSTED_PROXIES=canary"),
    ],
)
def test_no_refusal_repeats_a_value_or_a_name_that_may_be_one(files: tuple[Path, Path], yaml: str, env: str) -> None:
    """Whatever stands in the wrong place, in either file."""
    files[0].write_text(yaml)
    files[1].write_text(env)

    with pytest.raises(ConfigError) as refused:
        load_settings(*files)

    assert "canary" not in str(refused.value).lower()
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_a_misspelt_variable_stops_the_start(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable with one of our section names must be one of our keys."""
    monkeypatch.setenv("CACHE__SZIE", "5")

    with pytest.raises(ConfigError, match=r"cache\.szie: there is no such key"):
        load_settings(*files)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODLE__NAME", "x", "MODLE__NAME: there is no section modle; is it model?"),
        ("LOG__LEVEL", "DEBUG", "LOG__LEVEL: there is no section log; is it logging?"),
        ("SECURITY__CORS_ORIGINS", "https://a", 'a list is written as JSON, such as ["a", "b"]'),
    ],
)
def test_a_variable_that_nearly_is_ours_stops_the_start(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """Other programs' variables are left alone."""
    monkeypatch.setenv("GIT__SOMETHING", "x")
    load_settings(*files)
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError) as refused:
        load_settings(*files)

    assert message in str(refused.value)


def test_a_misspelt_section_of_dotenv_stops_the_start(files: tuple[Path, Path]) -> None:
    files[1].write_text("LOG__LEVEL=DEBUG\n")

    with pytest.raises(ConfigError, match="LOG__LEVEL: there is no section log; is it logging"):
        load_settings(*files)


def test_variables_of_other_programs_in_dotenv_are_passed_over_and_named_with_their_line(
    files: tuple[Path, Path],
) -> None:
    """With what was probably meant, where they are nearly ours; never with a name that may be a secret."""
    files[1].write_text("# mine\nNODE_ENV=x\nPORT=9000\nMODEL__MAX_TOKENS=7\nGIT__X=1\nMODEL_DEVICE=cpu\nSK_4111=x\n")

    assert 7 == load_settings(*files).model.max_tokens

    found = {each.name: (each.where, each.meant) for each in unread_variables({}, files[1])}
    assert {
        "NODE_ENV": (f"{files[1]}, line 2", None),
        "PORT": (f"{files[1]}, line 3", "APP__PORT"),
        "GIT__X": (f"{files[1]}, line 5", None),
        "MODEL_DEVICE": (f"{files[1]}, line 6", "MODEL__DEVICE"),
        "(a name that is not shown)": (f"{files[1]}, line 7", None),
    } == found


def test_of_the_environment_only_likely_mistakes_are_named(files: tuple[Path, Path]) -> None:
    environment = {"PATH": "/bin", "PORT": "9000", "HF_TOKEN": "x", "DATABASE_URI": "x", "remote__headers__x": "y"}

    assert [("DATABASE_URI", "DATABASE_URL"), ("PORT", "APP__PORT")] == [
        (each.name, each.meant) for each in unread_variables(environment, files[1])
    ]


@pytest.mark.parametrize(
    ("given", "name", "source"),
    [
        ({"name": "google/gemma-2-2b-it"}, "google/gemma-2-2b-it", "hub"),
        ({"name": "org/folder"}, "org/folder", "local"),
        ({"name": "org/missing"}, "org/missing", "local"),
        ({"name": "gpt2"}, "gpt2", "local"),
        ({"name": "models:/chat@production"}, "models:/chat@production", "mlflow"),
        ({"name": "/models/of/mine"}, "/models/of/mine", "local"),
        ({"name": "./org/name"}, "./org/name", "local"),
        ({"name": "org/folder", "source": "hub"}, "org/folder", "hub"),
        ({"name": "google/gemma-2-2b-it", "source": "local"}, "google/gemma-2-2b-it", "local"),
        ({}, str(ROOT / "models/tiny-chat"), "local"),
    ],
)
def test_where_a_model_comes_from_is_seen_from_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], name: str, source: str
) -> None:
    """Unless it is said; the embedded model is found from any folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/folder").mkdir(parents=True)
    for key, value in given.items():
        monkeypatch.setenv(f"MODEL__{key.upper()}", value)

    settings = load_settings(ROOT / "config.yml")

    assert (name, source) == (settings.model.name, settings.model.source)
    assert ROOT / "prompts" == settings.app.prompts_dir
    if given:
        (entry,) = load_settings(models=[given]).models
        assert (name, source) == (entry.name, entry.source)


def test_a_file_that_is_not_utf_8_is_named(files: tuple[Path, Path]) -> None:
    """The one that is wrong, be it the YAML or the .env."""
    files[1].write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError, match=r"\.env is not UTF-8 text"):
        load_settings(*files)


def test_secrets_never_show_in_messages_or_reprs(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an error about a neighbour nor the settings' own repr prints a key or a token."""
    monkeypatch.setenv("SECURITY__API_KEY", "canary-key-1234")
    monkeypatch.setenv("HF_TOKEN", "canary-token-1234")
    monkeypatch.setenv("REDIS__ENCRYPTION_KEY", b64encode(b"canary".ljust(32)).decode())
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-password")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "canary-token")
    settings = load_settings(*files)
    monkeypatch.setenv("SECURITY__API_KEY", "canary")
    monkeypatch.setenv("SECURITY__MAX_PROMPT_CHARS", "canary-too")

    with pytest.raises(ConfigError) as refused:
        load_settings(*files)

    assert "canary" not in str(refused.value)
    assert "canary" not in repr(settings)
    assert b64encode(b"canary").decode()[:8] not in repr(settings)
    assert (b"canary".ljust(32),) == settings.redis.encryption_keys
    assert settings.hub_token is not None
    assert "canary-token-1234" == settings.hub_token.get_secret_value()


def test_the_variable_of_mlflow_gives_way_to_our_own(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read as MLflow's own client reads it; what it says matters only where a model comes from a registry."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///of-another-program")
    assert "sqlite:///of-another-program" == load_settings(*files).where_registry

    files[0].write_text("mlflow: {tracking_uri: 'https://registry.test/mlflow'}")
    assert "https://registry.test/mlflow" == load_settings(*files).where_registry


def test_an_empty_variable_is_an_unset_one(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`SECURITY__API_KEY=` in a copied .env.example is no key and no error."""
    files[1].write_text("SECURITY__API_KEY=\nMODEL__REVISION=\n")

    settings = load_settings(*files)

    assert (None, None) == (settings.security.api_key, settings.model.revision)


def _keys(model: type[Section] | type[Settings], prefix: str = "") -> set[str]:
    """Return every key below a model, as SECTION__KEY in lower case."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys |= _keys(kind, f"{name}__")
        else:
            keys.add(prefix + name)
    return keys


def test_env_example_documents_every_key_with_its_true_default(files: tuple[Path, Path]) -> None:
    """Every key stands in .env.example; with all of them switched on the settings are those of config.yml."""
    text = (ROOT / ".env.example").read_text()
    named = set(re.findall(r"^# ([A-Z_]+)=", text, re.MULTILINE))
    files[1].write_text(re.sub(r"^# ([A-Z_]+=)", r"\1", text, flags=re.MULTILINE))

    assert {key.upper() for key in _keys(Settings)} - named == {"HF_TOKEN"}
    assert load_settings(*files).model_dump() == load_settings(ROOT / "config.yml", None).model_dump()


def test_env_example_is_made_from_the_config_file() -> None:
    """`python -m scripts.env_example` gives the file that is in the repository."""
    assert env_example((ROOT / "config.yml").read_text()) == (ROOT / ".env.example").read_text()


def test_config_yml_shows_every_key_at_its_default(files: tuple[Path, Path]) -> None:
    """The shipped file changes nothing, so it can be read as the list of defaults."""
    assert load_settings(files[0], None).model_dump() == load_settings(ROOT / "config.yml", None).model_dump()


@pytest.mark.parametrize(
    ("yaml", "store"),
    [
        ("", "off"),
        ("redis: {url: 'redis://a'}", "redis"),
        ("{redis: {url: 'redis://a'}, cache: {persistent: false}}", "off"),
        ("{redis: {url: 'redis://a'}, cache: {persistent: database}}", "database"),
        ("{redis: {url: 'redis://a'}, cache: {enabled: false}}", "off"),
        ("cache: {persistent: true}", "database"),
        ("cache: {persistent: off}", "off"),
        ("cache: {enabled: false, persistent: database}", "off"),
    ],
)
def test_answers_are_stored_beside_memory_in_one_place(files: tuple[Path, Path], yaml: str, store: str) -> None:
    """In Redis where there is one, unless something else is said; `true` is the database, as it was."""
    files[0].write_text(yaml)

    assert store == load_settings(*files).cache_store
