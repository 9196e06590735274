"""Defines the settings of LoRA adapters."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from app.config.section import Section


class AdaptersConfig(Section):
    """LoRA adapters of the served model, which POST /v1/adapters/load loads while the service runs."""

    roots: tuple[Path, ...] = ()
    """Folders below which an adapter may lie; empty: none can be loaded."""
    max_loaded: PositiveInt = 16
    """Adapters in memory at once."""
    max_rank: Annotated[int, Field(ge=1, le=512)] = 64
    """Highest rank of an adapter's layers: memory and time of an adapter grow with it."""
    grace_seconds: NonNegativeInt = 25
    """How long the running requests of an adapter that is unloaded may take before they are aborted."""
