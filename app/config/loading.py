"""Loads the settings: config.yml < .env < environment."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsConfigDict, SettingsError
from yaml import YAMLError

from app.config.sections import Settings
from app.config.variables import NOT_SHOWN, may_be_shown, names_in, nearest_section
from app.errors import ConfigError

MAX_POSITION = 1000
"""A greater number is no position in a list, but a key that somebody wrote."""


def load_settings(
    config_file: Path | str = "config.yml", env_file: Path | str | None = ".env", **overrides: Any
) -> Settings:
    """Load and validate the configuration.

    Args:
        config_file: YAML; a missing file leaves the defaults.
        env_file: KEY=value lines; None reads no file.
        overrides: sections whose keys take precedence over every source, for tests and command line options.
    Raises: ConfigError: a key is unknown or a value is invalid; the message names each one with its reason.
    """

    class Located(Settings):
        model_config = SettingsConfigDict(yaml_file=config_file, env_file=env_file)

    _refuse_unreadable(config_file, env_file)
    _refuse_near_misses([*os.environ, *names_in(Path(env_file) if env_file else None)])
    try:
        return Located(**overrides)
    except ValidationError as error:
        reasons = "; ".join(_reason(item) for item in error.errors(include_input=False, include_url=False))
        raise ConfigError(f"configuration: {reasons}") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"configuration: {config_file}{where} is not valid YAML") from None
    except SettingsError as error:
        raise ConfigError(f'configuration: {error}: a list is written as JSON, such as ["a", "b"]') from None
    except (TypeError, ValueError):
        raise ConfigError(f"configuration: {config_file} must hold sections of the form `key: value`") from None


def _refuse_unreadable(*files: Path | str | None) -> None:
    for path in (Path(file) for file in files if file is not None):
        if not path.exists():
            continue
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"configuration: {path} is not UTF-8 text") from None
        except OSError as error:
            raise ConfigError(f"configuration: {path} cannot be read: {error.strerror}") from None


def _refuse_near_misses(names: Iterable[str]) -> None:
    """Refuse variables whose prefix is nearly a section's name; all others belong to other software."""
    for name in names:
        if (meant := nearest_section(name)) is not None:
            section, _, key = name.partition("__")
            shown = name if may_be_shown(key) else f"{section}__{NOT_SHOWN}"
            raise ConfigError(f"configuration: {shown}: there is no section {section.lower()}; is it {meant}?")


def _reason(item: Any) -> str:
    key = ".".join(str(part) if _may_be_shown(part) else NOT_SHOWN for part in item["loc"])
    if item["type"] in ("extra_forbidden", "invalid_key"):
        return f"{key}: there is no such key"
    return f"{key}: {item['msg'].removeprefix('Value error, ')}"


def _may_be_shown(part: str | int) -> bool:
    """Return whether a part of a key is a position in a list or words."""
    return part < MAX_POSITION if isinstance(part, int) else may_be_shown(part)
