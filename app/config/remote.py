"""Defines the settings of an engine that is another server with OpenAI's routes."""

import re
from dataclasses import fields
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, field_validator

from app.config.section import Section
from app.types import SamplingParams

ServerName = Literal["auto", "llm-service", "vllm", "sglang", "tgi", "llama.cpp", "ollama", "transformers", "openai"]

REFUSABLE = frozenset(each.name for each in fields(SamplingParams)) - {"max_tokens", "sample"} | {"tools"}
"""What a server may lack."""
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+", re.ASCII)
_OWN_HEADERS = frozenset(["authorization", "content-length", "content-type", "host", "transfer-encoding"])


class RemoteConfig(Section):
    """The servers behind `model.engine: remote`, which have OpenAI's routes and all serve the same model."""

    base_urls: tuple[str, ...] = ()
    """Addresses of the servers, with or without /v1; each request goes to one of them."""
    api_key: SecretStr | None = None
    """Sent to them as `Authorization: Bearer`; unset sends none."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Further headers of every request to them."""
    model: str | None = None
    """The model's name there; unset is `model.name` if they list it, otherwise the only model that they list."""
    server: ServerName = "auto"
    """What they are, which decides what can be asked of them.  auto: as their list of models shows; openai takes
    nothing for granted but OpenAI's own fields."""
    unsupported: tuple[str, ...] = ()
    """Sampling parameters, or `tools`, that they lack beside what `server` lacks; requests with them are refused."""
    tokenizer: str = "auto"
    """Where prompts are counted: a folder or a hub id with the model's tokenizer, or `server`, by its route /tokenize.
    none estimates by bytes; auto is server where that route answers, otherwise none."""
    bytes_per_token: Annotated[float, Field(ge=1, le=8)] = 2.0
    """UTF-8 bytes per token of an estimate: text of common vocabularies has 3 to 5, and no tokenizer that works on
    bytes has fewer than 1."""
    connect_seconds: PositiveFloat = 5
    """Time to connect."""
    idle_seconds: PositiveFloat = 60
    """Longest silence in the middle of a response."""
    probe_seconds: PositiveFloat = 1
    """Pause between two attempts to reach a server that failed."""
    max_connections: PositiveInt = 1024
    """Open connections to each server; a request without one waits."""

    @field_validator("base_urls")
    @classmethod
    def _are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for number, url in enumerate(value, 1):
            if not _is_address(url):
                raise ValueError(
                    f"entry {number} is no address such as http://127.0.0.1:8001/v1; keys go into remote.api_key"
                )
        if len({url.rstrip("/").removesuffix("/v1") for url in value}) < len(value):
            raise ValueError("one address stands there twice")
        return value

    @field_validator("unsupported")
    @classmethod
    def _are_parameters(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for number, name in enumerate(value, 1):
            if name not in REFUSABLE:
                raise ValueError(f"entry {number} is none of {', '.join(sorted(REFUSABLE))}")
        return value

    @field_validator("api_key")
    @classmethod
    def _is_header_value(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or not (key := value.get_secret_value().strip()):
            return None
        if not _is_printable(key) or " " in key:
            raise ValueError("a key has letters, digits and signs, no spaces or line breaks")
        return SecretStr(key)

    @field_validator("headers")
    @classmethod
    def _are_headers(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for number, (name, content) in enumerate(value.items(), 1):
            if not _HEADER_NAME.fullmatch(name) or not _is_printable(content.get_secret_value()):
                raise ValueError(f"entry {number} is no header")
            if name.lower() in _OWN_HEADERS:
                raise ValueError(f"entry {number} is a header that the service sets itself; a key is remote.api_key")
        return value


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises for a port that is none
    except ValueError:
        return False
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def _is_printable(text: str) -> bool:
    return text.isascii() and text.isprintable()
