"""Defines the settings of LoRA adapters."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints, model_validator

from app.config.section import Section

AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,255}$")]


class AdapterPreload(Section):
    """An adapter that is loaded with its model."""

    name: AdapterName
    """Requests use it as their model."""
    source: Annotated[str, StringConstraints(min_length=1)]
    """A folder, relative to one of `adapters.roots` or to the working directory, or an absolute path."""
    model: str | None = None
    """The name of the model that it is for; unset: the default one."""


class AdaptersConfig(Section):
    """LoRA adapters of the models, loaded with them or by POST /v1/adapters/load."""

    preload: tuple[AdapterPreload, ...] = ()
    """Adapters that are loaded whenever their model is."""
    roots: tuple[Path, ...] = ()
    """Folders below which an adapter may lie that is loaded while the service runs; empty: none can be."""
    max_loaded: PositiveInt = 16
    """Adapters in memory at once."""
    max_rank: Annotated[int, Field(ge=1, le=512)] = 64
    """Highest rank of an adapter's layers: memory and time of an adapter grow with it."""
    grace_seconds: NonNegativeInt = 25
    """How long the running requests of an adapter that is unloaded may take before they are aborted."""

    @model_validator(mode="after")
    def _preloads_what_it_may(self) -> Self:
        names = [each.name for each in self.preload]
        if len(set(names)) < len(names):
            raise ValueError("preload has two adapters of one name")
        if len(names) > self.max_loaded:
            raise ValueError("preload has more adapters than max_loaded allows")
        return self
