"""Reads the variables and the configuration file of older services, which count below this service's own names.

A variable stands in the environment or in .env.  docs/compat.md lists them.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, YamlConfigSettingsSource

_KEYS = {
    "API_KEY": ("security", "api_key"),
    "API_HOST": ("app", "host"),
    "API_PORT": ("app", "port"),
    "API_WORKERS": ("compat", "workers"),
    "LOG_LEVEL": ("logging", "level"),
    "MODEL_NAME": ("model", "name"),
}
"""Older variable -> section and key."""
OLDER_VARIABLES = frozenset([*_KEYS, "DEBUG"])
_LEVELS = {"WARN": "WARNING", "CRITICAL": "ERROR", "FATAL": "ERROR"}
"""Level of Python's logging -> the nearest one of the service."""
_TRUE = ("1", "true", "yes", "on")


class OwnVariables(PydanticBaseSettingsSource):
    """The source of .env without the variables of older services and other programs, which would be unknown keys."""

    def __init__(self, settings_cls: type[BaseSettings], dotenv: PydanticBaseSettingsSource) -> None:
        super().__init__(settings_cls)
        self._dotenv = dotenv
        self.older: dict[str, str] = {}
        """The older variables that were left out, once the source has been read."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._dotenv.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        data = self._dotenv()
        self.older = {name: str(data[name.lower()]) for name in OLDER_VARIABLES if name.lower() in data}
        return {key: value for key, value in data.items() if key in self.settings_cls.model_fields}


class OlderVariables(PydanticBaseSettingsSource):
    """The older variables under the keys that they have here."""

    def __init__(self, settings_cls: type[BaseSettings], dotenv: OwnVariables) -> None:
        super().__init__(settings_cls)
        self._dotenv = dotenv

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return no value: `__call__` returns all of them at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        environment = {name: value for name in OLDER_VARIABLES if (value := os.environ.get(name))}
        given = self._dotenv.older | environment
        if "name" in self.current_state.get("model", {}):
            given.pop("MODEL_NAME", None)  # with the source that would come with it
        state = self.current_state
        registry = state.get("mlflow_tracking_uri") or state.get("mlflow", {}).get("tracking_uri")
        return _sections(given, in_registry=bool(registry))


def _sections(given: Mapping[str, str], *, in_registry: bool) -> dict[str, Any]:
    """Return the sections that older variables stand for.  Args: in_registry: whether a registry has the model."""
    sections: dict[str, dict[str, Any]] = {}
    for name, (section, key) in _KEYS.items():
        if name in given:
            sections.setdefault(section, {})[key] = given[name]
    if level := given.get("LOG_LEVEL", "").upper():
        sections["logging"]["level"] = _LEVELS.get(level, level)
    elif given.get("DEBUG", "").lower() in _TRUE:
        sections["logging"] = {"level": "DEBUG"}
    if model := given.get("MODEL_NAME"):
        if Path(model).is_dir():
            sections["model"]["source"] = "local"
        else:
            sections["model"] = _registered(model) if in_registry else {"name": model, "source": "hub"}
    return sections


def _registered(name: str, stage: str = "Production") -> dict[str, str]:
    """Return the keys of a registered model, at the stage at which the older service took it."""
    return {"name": name if name.startswith("models:/") else f"models:/{name}/{stage}", "source": "mlflow"}


class ConfigFile(YamlConfigSettingsSource):
    """The source of config.yml, which may be the file of an older service: that one has a section `api`."""

    def __call__(self) -> dict[str, Any]:
        data = super().__call__()
        return _translated(data) if isinstance(data.get("api"), dict) else data


_FILE_KEYS = {
    ("api", "host"): ("app", "host"),
    ("api", "port"): ("app", "port"),
    ("api", "workers"): ("compat", "workers"),
    ("model", "max_tokens"): ("compat", "predict_most_length"),
    ("model", "default_max_length"): ("compat", "predict_max_length"),
    ("model", "batch_size"): ("model", "max_batch_size"),
}
"""Section and key of that file -> section and key here; all others are the same in both."""


def _translated(data: Mapping[str, Any]) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for section, keys in data.items():
        if not isinstance(keys, dict):
            sections[section] = keys
            continue
        for key, value in keys.items():
            here, name = _FILE_KEYS.get((section, key), (section, key))
            sections.setdefault(here, {})[name] = value
    registry = sections.get("mlflow", {})
    if name := registry.pop("model_name", None):
        sections.setdefault("model", {}).update(_registered(name, registry.pop("model_stage", "Production")))
    return sections
