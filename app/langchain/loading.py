"""Makes the engines of LangChain's classes: a model loaded for this program, or the model of a running service.

Decides which arguments of HuggingFacePipeline.from_model_id have a meaning here; the others are refused by name.
"""

import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from msgspec import structs
from pydantic import SecretStr

from app.config import DeadlineConfig, ModelConfig
from app.config.model import ModelHosting
from app.engine.base import PreparedPrompt
from app.engine.local import LocalEngine
from app.engine.parsing.parsed_engine import ParsedEngine
from app.engine.wrapper import EngineWrapper
from app.events import Event
from app.langchain.engine_thread import ThreadedEngine
from app.langchain.service_engine import ServiceEngine
from app.privacy.filters import FilteredEngine, InputFilter
from app.privacy.message_texts import map_texts
from app.privacy.redactor import PiiKind, Redactor
from app.requests import GenerationRequest
from app.types import SamplingParams

ALIASES: Mapping[str, str] = {"max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}
"""Other names of sampling parameters, as transformers and OpenAI have them."""
CALL_ARGUMENTS = frozenset(field.name for field in fields(SamplingParams)) - {"sample", "prompt_logprobs"}
"""Sampling parameters that a caller may set; LangChain has no place for the results of the other two."""
_OF_A_SERVICE = {"name", "source", "served_name", "max_tokens", "temperature", "spare_worker"}
MODEL_ARGUMENTS = frozenset(ModelConfig.model_fields) - ModelHosting.model_fields.keys() - _OF_A_SERVICE
"""Settings of the section `model` that `from_model_id` takes."""
_PATIENT = DeadlineConfig(waiting_seconds=86_400, first_token_seconds=86_400, total_seconds=86_400)
"""A program waits for its own batches; it is not one of many callers."""
_MANY = 1_000_000_000


def sampling_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation arguments under the names of `SamplingParams`.

    Raises: ValueError: an argument that nothing would honour, or one twice under two names.
    """
    arguments: dict[str, Any] = {}
    for name, value in _without_do_sample(given).items():
        known = ALIASES.get(name, name)
        if known in arguments:
            raise ValueError(f"{name} and another argument both set {known}")
        arguments[known] = value
    if unknown := sorted(arguments.keys() - CALL_ARGUMENTS):
        names = ", ".join(sorted({*CALL_ARGUMENTS, *ALIASES, "do_sample"}))
        raise ValueError(f"unknown generation arguments: {', '.join(unknown)}; known: {names}")
    if isinstance(stop := arguments.get("stop"), str):
        arguments["stop"] = (stop,)
    elif stop is not None:
        arguments["stop"] = tuple(stop)
    if isinstance(bias := arguments.get("logit_bias"), Mapping):
        arguments["logit_bias"] = tuple(sorted((int(token_id), float(each)) for token_id, each in bias.items()))
    return {name: value for name, value in arguments.items() if value is not None}


def _without_do_sample(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with transformers' switch for sampling as the temperature that it stands for."""
    arguments = dict(given)
    match arguments.pop("do_sample", None):
        case False:
            arguments["temperature"] = 0.0
        case True if arguments.get("temperature") is None:
            arguments["temperature"] = 1.0
    return arguments


def connect(
    base_url: str, key: str | SecretStr | None, *, model: str | None, model_id: str | None, timeout_seconds: float
) -> ThreadedEngine:
    """Return the model of a running service.

    Raises:
        ValueError: an argument is not what it should be.
        AppError: no service answers, it refuses the key, or it has no such model.
    """
    secret = key.get_secret_value() if isinstance(key, SecretStr) else key
    # Read from a file it may end with a line.
    secret = secret.strip() if secret else None
    engine = ServiceEngine(base_url, secret, model=_one_name(model, model_id), timeout_seconds=timeout_seconds)
    return ThreadedEngine(engine, f"service {engine.base_url}")


def load(
    model_id: str | None,
    *,
    model: str | None,
    filters: bool,
    token: str | SecretStr | None,
    settings: Mapping[str, Any],
) -> ThreadedEngine:
    """Return a model that is loaded for this program, in a process of its own.

    Args:
        model_id, model: a folder, or an id of the hub, under either name.
        filters: whether personal data is masked in prompts and completions.
        token: for gated models of the hub; by default that of the environment.
        settings: of the section `model` of the configuration.
    Raises: ValueError: an argument is not what it should be. EngineFailed: the model cannot be loaded.
    """
    if (name := _one_name(model_id, model)) is None:
        raise ValueError("model_id is required: a folder, or an id of the hub")
    config = ModelConfig(
        **{"max_waiting": _MANY, "max_waiting_tokens": _MANY, **settings},
        name=name,
        source=_source(name),
        spare_worker=False,
    )
    secret = token.get_secret_value() if isinstance(token, SecretStr) else token
    secret = secret or os.environ.get("HF_TOKEN") or os.environ.get("HUGGINGFACE_TOKEN")
    engine = ParsedEngine(LocalEngine(config, _PATIENT, hub_token=secret, stall_seconds=config.stall_seconds))
    return ThreadedEngine(_MaskedEngine(engine) if filters else engine, f"model {name}")


def model_settings(
    task: str,
    backend: str,
    device: Any,
    device_map: Any,
    model_kwargs: Mapping[str, Any] | None,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the settings of the section `model` that arguments of `from_model_id` stand for.

    Raises: ValueError: an argument that nothing would honour.
    """
    if task != "text-generation":
        raise ValueError(f"task must be text-generation: {task} is not what this engine does")
    if backend not in ("default", "pipeline"):
        raise ValueError(f"backend must be default: {backend} is not used here")
    if device_map not in (None, "auto"):
        raise ValueError("device_map must be auto: a model is loaded on one device, which device names")
    if isinstance(device, int):
        raise ValueError("device must be auto, cpu, cuda or mps, not a number; CUDA_VISIBLE_DEVICES chooses among GPUs")
    settings = {**(model_kwargs or {}), **others}
    if "torch_dtype" in settings:
        settings["dtype"] = settings.pop("torch_dtype")
    if "dtype" in settings:
        settings["dtype"] = str(settings["dtype"]).removeprefix("torch.")
    if device is not None:
        settings["device"] = device
    if unknown := sorted(settings.keys() - MODEL_ARGUMENTS):
        known = ", ".join(sorted({*MODEL_ARGUMENTS, "torch_dtype"}))
        raise ValueError(f"arguments that this engine does not take: {', '.join(unknown)}; known: {known}")
    return settings


def pipeline_arguments(pipeline_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the sampling parameters among the arguments of a pipeline of transformers.

    Raises: ValueError: an argument that nothing would honour.
    """
    given = dict(pipeline_kwargs or {})
    if given.pop("return_full_text", False):
        raise ValueError("pipeline_kwargs: return_full_text must be false: what is returned is the completion")
    try:
        return sampling_arguments(given)
    except ValueError as error:
        raise ValueError(f"pipeline_kwargs: {error}") from None


def _one_name(name: str | None, other: str | None) -> str | None:
    if name is not None and other not in (None, name):
        raise ValueError("model and model_id are two names of one argument and must not differ")
    return other if name is None else name


def _source(name: str) -> Literal["local", "hub"]:
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"the folder {name} holds no model (no config.json)")
        return "local"
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name}")
    return "hub"


class _MaskedEngine(EngineWrapper):
    """Masks personal data in prompts and completions, as the service does by default."""

    def __init__(self, engine: ParsedEngine) -> None:
        redactor = Redactor(list(PiiKind))
        super().__init__(FilteredEngine(engine, redactor, lambda kind, count: None))
        self._input = InputFilter(redactor, "mask", lambda kind, count: None)

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        """Encode the prompt without personal data."""
        return await self._inner.prepare(await self._masked(request))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate; what stands beside the encoded prompt is masked too."""
        async with aclosing(self._inner.stream(await self._masked(request))) as events:
            async for event in events:
                yield event

    async def _masked(self, request: GenerationRequest) -> GenerationRequest:
        async def filtered(texts: list[str]) -> list[str]:
            return await self._input.clean(request.tenant, texts)

        return structs.replace(
            request,
            messages=tuple(await map_texts(request.messages, filtered)),
            tools=tuple(await map_texts(request.tools, filtered)),
            text=None if request.text is None else (await filtered([request.text]))[0],
        )
