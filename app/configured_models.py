"""The models that the configuration names, and their adapters: by which names, and which are loaded at the start."""

from collections.abc import Mapping
from dataclasses import dataclass

from app.config import Settings
from app.engine.adapters import AdapterRegistry
from app.engine.base import EncoderEngine, Engine
from app.engine.model_source import LoadSpec
from app.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfiguredModels:
    """The models of one application, by their public names."""

    names: tuple[str, ...]
    """Of all models, the default one first."""
    specs: Mapping[str, LoadSpec]
    """Of those that generate; empty where engines take their place."""
    preloaded: tuple[str, ...]
    """Of those that are loaded at the start."""
    engines: Mapping[str, Engine]
    """Engines that were passed in the place of all configured models that generate."""
    encoders: Mapping[str, EncoderEngine] | None
    """The same for the model that only embeds; None where there are none in its place."""

    @classmethod
    def of(
        cls,
        settings: Settings,
        *,
        engines: Mapping[str, Engine] | None = None,
        encoders: Mapping[str, EncoderEngine] | None = None,
    ) -> "ConfiguredModels":
        """Return the models that are configured, or the engines in their place.

        Raises: ConfigError: two have the same name.
        """
        specs = {} if engines else _specs(settings)
        encoder = settings.embeddings.public_name
        names = [*(engines or specs), *(encoders if encoders is not None else [encoder] if encoder else [])]
        if len(set(names)) < len(names):
            raise ConfigError(f"configuration: embeddings.model: {encoder} is the name of the chat model, too")
        return cls(
            names=tuple(names),
            specs=specs,
            preloaded=tuple(name for name in names if name not in specs or _is_preloaded(settings, name)),
            engines=engines or {},
            encoders=encoders,
        )

    @property
    def default(self) -> str:
        """Return the name of the model that serves requests which name none."""
        return self.names[0]

    def adapters(self, settings: Settings) -> AdapterRegistry:
        """Return the registry of adapters, with those of the configuration.

        Raises: ConfigError: one has the name of a model, or is for a model that is not configured.
        """
        for each in settings.adapters.preload:
            if each.name in self.names:
                raise ConfigError(f"configuration: adapters.preload: {each.name} is the name of a model, too")
            if each.model is not None and each.model not in self.names:
                raise ConfigError(f"configuration: adapters.preload: no model of the name {each.model} is configured")
        return AdapterRegistry(settings.adapters, default_model=self.default)


def _specs(settings: Settings) -> dict[str, LoadSpec]:
    """Return the configured models that generate, by their names, the default one first.

    Raises: ConfigError: one is the name of two.
    """
    configured = [(settings.model, settings.remote)]
    configured += [(each.config(settings.model), each.remote or settings.remote) for each in settings.models]
    specs: dict[str, LoadSpec] = {}
    for config, remote in configured:
        name = config.public_name
        if name in specs:
            raise ConfigError(f"configuration: models: two have the name {name}; set served_name")
        specs[name] = LoadSpec(name=name, config=config, remote=remote if config.engine == "remote" else None)
    return specs


def _is_preloaded(settings: Settings, name: str) -> bool:
    """Return whether a configured model that generates is loaded at the start."""
    entries = {entry.config(settings.model).public_name: entry.preload for entry in settings.models}
    return entries.get(name, settings.model.preload)
