"""Loads the settings: config.yml < .env < environment."""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsConfigDict, SettingsError
from yaml import YAMLError

from app.config.sections import Settings
from app.errors import ConfigError, is_plain_name

_NOT_SHOWN = "(a name that is not shown)"
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
    _refuse_near_misses(os.environ)
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


def _refuse_near_misses(environment: Mapping[str, str]) -> None:
    """Refuse variables whose prefix is nearly a section's name; all others belong to other software."""
    for name in environment:
        section, separator, key = name.lower().partition("__")
        if separator and section not in Settings.model_fields:
            for meant in get_close_matches(section, Settings.model_fields, n=1, cutoff=0.75):
                shown = name if _may_be_shown(key) else f"{name.partition('__')[0]}__{_NOT_SHOWN}"
                raise ConfigError(f"configuration: {shown}: there is no section {section}; is it {meant}?")


def _reason(item: Any) -> str:
    key = ".".join(str(part) if _may_be_shown(part) else _NOT_SHOWN for part in item["loc"])
    if item["type"] in ("extra_forbidden", "invalid_key"):
        return f"{key}: there is no such key"
    return f"{key}: {item['msg'].removeprefix('Value error, ')}"


def _may_be_shown(part: str | int) -> bool:
    """Return whether a part of a key is a position in a list or words; anything else may be a secret."""
    if isinstance(part, int):
        return part < MAX_POSITION
    return all(is_plain_name(word) for word in part.lower().split("__"))
