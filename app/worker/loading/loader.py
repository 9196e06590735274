"""Bring a model from a folder or the hub into memory, as a transformers text-generation pipeline.

Decides device, dtype, context window, end tokens, and which models are refused: no remote code, no pickled weights,
no adapters, nothing but decoder-only language models.  Knows no sockets and no requests.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
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
    TextGenerationPipeline,
    pipeline,
)

from app.ipc.messages import ModelSpec
from app.worker.execution.native.native_build import CompileError
from app.worker.execution.native.packed_linear import gemm_kernels
from app.worker.execution.torch.quantization import PROBE_TOKENS, TEXT, QuantizationError, quantize_linears

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_FILES_LEFT = ["*/*", "consolidated*"]
"""Other formats of the same weights."""
RECOMMENDED_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
CONTEXT_WHEN_UNSAID = 2048
"""For models without a fixed window (ALiBi, recurrent) whose configuration names none."""


class LoadError(Exception):
    """The model cannot be served; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, with what a runner has to know of it."""

    pipeline: TextGenerationPipeline
    revision: str | None
    """Commit on the hub."""
    device: str
    dtype: str
    context_length: int
    vocab_size: int
    """Rows of the embedding: a token id at or above it would end the process on a GPU."""
    parameters: int
    end_ids: tuple[int, ...]
    """Any of these ends an answer."""
    pad_id: int
    recommended: tuple[tuple[str, float], ...] = ()
    """Sampling settings of its generation_config.json, as far as a request can set them too."""
    logprob_shift: float | None = None
    """By how much quantization changed log-probabilities; None where there is none."""


def load(spec: ModelSpec, tokenizer_folder: str, on_stage: Callable[[str], None]) -> LoadedModel:
    """Load the model and leave its tokenizer in `tokenizer_folder`.

    Raises: LoadError: this service cannot run it.  Others (out of memory, a damaged file) as they come;
        `load_reason` puts them in one line.
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
    recommended = _recommended(model.generation_config)
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
    """Put what went wrong in one line that an operator can act on."""
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
    """Return where the files are and their commit, after a download where needed."""
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
                spec.name, revision=spec.revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_LEFT
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


def _tokenizer(folder: str, leave_in: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not getattr(tokenizer, "is_fast", False):
        raise LoadError("its tokenizer has no fast form (tokenizer.json)")
    tokenizer.save_pretrained(leave_in)
    return tokenizer


def _device(wanted: str) -> str:
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, there in usable.items() if there)
    if not usable[wanted]:
        raise LoadError(f"this machine has no usable device {wanted}")
    return wanted


def _dtype(spec: ModelSpec, device: str, config: Any) -> torch.dtype | str:
    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)  # type: ignore[no-any-return]
    if device != "cpu":
        return "auto"
    own = getattr(config.get_text_config(decoder=True), "dtype", None)
    # Weights of 8 bits have panels in float32 only, and torch's integers are far slower for single tokens.
    panels = spec.quantization == "int8" and spec.compile != "none" and _no_panels() is None
    # Without instructions for it, arithmetic in 16 bits takes up to 16 times as long as in 32.
    return "auto" if own == torch.bfloat16 and cpu_computes_bfloat16() and not panels else torch.float32


def _quantize(model: Any, tokenizer: Any, device: str, config: Any, spec: ModelSpec) -> float:
    """Return by how much it changes log-probabilities."""
    if device != "cpu":
        raise LoadError(f"int8 is for processors and not for {device}; choose dtype bfloat16 or float16 there")
    ids = tokenizer(TEXT, add_special_tokens=True).input_ids[: _context_length(config, PROBE_TOKENS)]
    try:
        integers = not _takes_panels(model, spec)
        return round(quantize_linears(model, torch.tensor([ids or [0]]), integers=integers), 4)
    except QuantizationError as error:
        raise LoadError(f"int8 is not to be had here: {error}") from None


def _takes_panels(model: Any, spec: ModelSpec) -> bool:
    """Return whether a program of our own will compute the model's linear layers."""
    if spec.compile == "none" or model.dtype != torch.float32:
        return False
    if (reason := _no_panels()) is not None:
        log.warning("int8 is left to torch: %s", reason)
    return reason is None


def _no_panels() -> CompileError | None:
    """Return why there is no program for linear layers, None where there is."""
    try:
        gemm_kernels()
    except CompileError as error:
        return error
    return None


def cpu_computes_bfloat16() -> bool:
    """Return whether this processor has instructions for bfloat16 matrices."""
    if torch.backends.cpu.get_cpu_capability().startswith("SVE"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _context_length(config: Any, limit: int | None) -> int:
    text = config.get_text_config(decoder=True)
    own = next((int(value) for name in CONTEXT_FIELDS if (value := getattr(text, name, None))), CONTEXT_WHEN_UNSAID)
    return min(own, limit) if limit is not None else own


def _end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Gather the end tokens from wherever a model names them; chat models often name theirs in one place only."""
    text = model.config.get_text_config(decoder=True)
    found: set[int] = set()
    for value in (
        model.generation_config.eos_token_id,
        getattr(text, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return tuple(sorted(found))


def _recommended(config: GenerationConfig) -> tuple[tuple[str, float], ...]:
    said: dict[str, Any] = {name: getattr(config, name, None) for name in RECOMMENDED_FIELDS}
    return tuple((name, value) for name, value in said.items() if value is not None)
