"""Load a model from a folder or the hub into memory, as a transformers text-generation pipeline.

Decides device, dtype, context window, end tokens, and which models are refused: no remote code, no pickled weights,
no adapters, nothing but decoder-only language models.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

from app.ipc.messages import ModelSpec
from app.worker.execution.executor_selection import native_linears_unavailable
from app.worker.execution.private_api import cpu_has_bfloat16
from app.worker.execution.quantization import (
    MAX_SAMPLE_TOKENS,
    SAMPLE_TEXT,
    QuantizationError,
    quantize_linears,
    round_to_int8,
)
from app.worker.execution.torch.int8_linear import int8_linear
from app.worker.loaded_model import LoadedModel

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_IGNORED_FILES = ["*/*", "consolidated*"]
"""Other formats of the same weights."""
RECOMMENDED_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
DEFAULT_CONTEXT_LENGTH = 2048
"""For models without a fixed window (ALiBi, recurrent) whose configuration names none."""


class LoadError(Exception):
    """The model cannot be served; the message is one line for the operator."""


def load(spec: ModelSpec, tokenizer_folder: str, on_stage: Callable[[str], None]) -> LoadedModel:
    """Load the model and save its tokenizer in `tokenizer_folder`.

    Raises: LoadError: this service cannot run it.  Other errors (out of memory, a damaged file) as they come;
        `load_reason` formats them in one line.
    """
    on_stage("files")
    folder, revision = _folder(spec)
    config = _config(spec, folder)
    device = _device(spec.device)
    on_stage("tokenizer")
    tokenizer = _tokenizer(folder, tokenizer_folder)
    on_stage("weights")
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=_dtype(spec, device, config),
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    model.eval()
    parameters = sum(weight.numel() for weight in model.parameters())
    logprob_shift = _quantize(model, tokenizer, device, config, spec) if spec.quantization == "int8" else None
    end_ids = _end_ids(model, tokenizer)
    recommended = _recommended_params(model.generation_config)
    # The model's own sampling defaults would fill in whatever a request leaves open.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return LoadedModel(
        pipeline=pipeline("text-generation", model=model, tokenizer=tokenizer, device=device),
        revision=revision,
        device=device,
        dtype=str(model.dtype).removeprefix("torch."),
        context_length=_context_length(config, spec.max_model_len),
        vocab_size=model.get_input_embeddings().num_embeddings,
        parameters=parameters,
        end_ids=end_ids,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(end_ids), 0),
        recommended=recommended,
        logprob_shift=logprob_shift,
    )


def load_reason(error: Exception) -> str:
    """Format an error as one line that an operator can act on."""
    match error:
        case LoadError():
            reason = str(error)
        case torch.OutOfMemoryError() | MemoryError():
            reason = "it does not fit into memory"
        case GatedRepoError():
            reason = "it is gated: accept its terms on the hub and set HF_TOKEN"
        case RevisionNotFoundError():
            reason = "the hub has no such revision of it"
        case RepositoryNotFoundError():
            reason = "the hub has no such model, or it is private and HF_TOKEN is missing or has no access"
        case OfflineModeIsEnabled() | LocalEntryNotFoundError():
            reason = "the hub cannot be reached and the model has not been downloaded before"
        case HfHubHTTPError():
            reason = f"the hub answered with an error ({_first_line(error)})"
        case _:
            reason = f"{type(error).__name__}: {_first_line(error)}"
    return f"The model cannot be loaded: {reason}."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")


def _folder(spec: ModelSpec) -> tuple[str, str | None]:
    """Return the folder of the files and their commit, after a download where needed."""
    if spec.source == "local":
        folder = Path(spec.name).expanduser().resolve()
        if not folder.is_dir():
            raise LoadError(f"there is no folder {folder}")
        revision = None
    else:
        if not HUB_ID.fullmatch(spec.name) or ".." in spec.name:
            raise LoadError("its name is not a hub id like owner/model")
        folder = Path(
            snapshot_download(
                spec.name, revision=spec.revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED_FILES
            )
        )
        revision = folder.name
    if (folder / "adapter_config.json").exists():
        raise LoadError("it is an adapter for another model, not a whole one")
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise LoadError("it has no weights in the safetensors format, and no other is read")
    return str(folder), revision


def _config(spec: ModelSpec, folder: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise LoadError("it needs Python code of its own, which is never run") from None
        raise
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LoadError(f"{config.model_type} is not a decoder-only language model")
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    names = {kind.__name__ for kind in (known if isinstance(known, tuple) else (known,))}
    named = config.architectures or [*names]
    if not any(name in names or name.endswith(("ForCausalLM", "LMHeadModel")) for name in named):
        raise LoadError(f"{', '.join(named)} is not a decoder-only language model")
    return config


def _tokenizer(folder: str, save_in: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not getattr(tokenizer, "is_fast", False):
        raise LoadError("its tokenizer has no fast form (tokenizer.json)")
    tokenizer.save_pretrained(save_in)
    return tokenizer


def _device(requested: str) -> str:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if requested == "auto":
        return next(name for name, usable in available.items() if usable)
    if not available[requested]:
        raise LoadError(f"this machine has no usable device {requested}")
    return requested


def _dtype(spec: ModelSpec, device: str, config: Any) -> torch.dtype | str:
    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)  # type: ignore[no-any-return]
    if device != "cpu":
        return "auto"
    checkpoint_dtype = getattr(config.get_text_config(decoder=True), "dtype", None)
    # Native int8 kernels compute in float32 only, and torch's integers are far slower for single tokens.
    native_int8 = spec.quantization == "int8" and spec.compile != "none" and native_linears_unavailable() is None
    # Without instructions for it, arithmetic in 16 bits takes up to 16 times as long as in 32.
    return "auto" if checkpoint_dtype == torch.bfloat16 and cpu_has_bfloat16() and not native_int8 else torch.float32


def _quantize(model: Any, tokenizer: Any, device: str, config: Any, spec: ModelSpec) -> float:
    """Quantize to int8 and return by how much that changes log-probabilities."""
    if device != "cpu":
        raise LoadError(f"int8 is for processors and not for {device}; choose dtype bfloat16 or float16 there")
    length = _context_length(config, MAX_SAMPLE_TOKENS)
    ids = tokenizer(SAMPLE_TEXT, add_special_tokens=True).input_ids[:length]
    quantize = round_to_int8 if _has_native_int8(model, spec) else int8_linear
    try:
        return round(quantize_linears(model, torch.tensor([ids or [0]]), quantize), 4)
    except QuantizationError as error:
        raise LoadError(f"int8 is not available here: {error}") from None


def _has_native_int8(model: Any, spec: ModelSpec) -> bool:
    """Return whether the native kernels will compute the model's linear layers."""
    if spec.compile == "none" or model.dtype != torch.float32:
        return False
    if (reason := native_linears_unavailable()) is not None:
        log.warning("int8 is left to torch: %s", reason)
    return reason is None


def _context_length(config: Any, limit: int | None) -> int:
    text = config.get_text_config(decoder=True)
    length = next(
        (int(value) for name in CONTEXT_FIELDS if (value := getattr(text, name, None))), DEFAULT_CONTEXT_LENGTH
    )
    return min(length, limit) if limit is not None else length


def _end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Collect the end tokens from every place a model may name them; chat models often use one place only."""
    text = model.config.get_text_config(decoder=True)
    found: set[int] = set()
    for value in (
        model.generation_config.eos_token_id,
        getattr(text, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return tuple(sorted(found))


def _recommended_params(config: GenerationConfig) -> tuple[tuple[str, float], ...]:
    values: dict[str, Any] = {name: getattr(config, name, None) for name in RECOMMENDED_FIELDS}
    return tuple((name, value) for name, value in values.items() if value is not None)
