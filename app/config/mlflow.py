"""Defines the settings of the registry that models come from."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from app.config.section import Section

_DEFAULT_BYTES = 256 * 1024**3


class MlflowConfig(Section):
    """The MLflow server whose registered models this service may load, and how their aliases are followed."""

    tracking_uri: str = ""
    """http:// or https:// address of the server; empty: MLFLOW_TRACKING_URI, and without that no model of a registry is
    loaded.  A name or password in it is refused: these are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    timeout_seconds: PositiveFloat = 30
    """For an answer of the server, and for each part of a file."""
    download_seconds: PositiveFloat = 3600
    """For all files of a model."""
    max_bytes: PositiveInt = _DEFAULT_BYTES
    """Bytes of all files of a model; a larger one is refused before anything is downloaded."""
    poll_seconds: Annotated[float, Field(ge=0)] = 60
    """How often a model that was named by an alias or a stage is looked up again; 0 never does."""
    probe_prompt: str = "Hello"
    """What a new version has to complete before it takes over."""
    probe_tokens: PositiveInt = 16
    """How many tokens of it."""

    @field_validator("tracking_uri")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        if value and (reason := tracking_uri_problem(value)) is not None:
            raise ValueError(reason)
        return value


def tracking_uri_problem(uri: str) -> str | None:
    """Return why an address cannot be that of the server, as a sentence without it; None if it can."""
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "this is no address"
    if parts.scheme not in ("http", "https") or not host:
        return "must begin with http:// or https:// and name a server; files and databases are read by that server"
    if "@" in parts.netloc:
        return "must hold no name or password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if parts.query or parts.fragment or any(not sign.isprintable() or sign.isspace() for sign in uri):
        return "must be an address without ?, # or spaces"
    return None
