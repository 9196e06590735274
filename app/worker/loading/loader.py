"""Load a model from a folder or the hub into memory, as a transformers text-generation pipeline.

Decides device, dtype, and which models are refused: no remote code, no pickled weights,
no adapters, nothing but decoder-only language models.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    TextGenerationPipeline,
    pipeline,
)

from app.ipc.messages import ModelSpec
from app.worker.execution.executor_selection import native_linears_unavailable
from app.worker.execution.linear_modules import linear_shapes
from app.worker.execution.private_api import cpu_has_bfloat16
from app.worker.execution.quantization import (
    QuantizationError,
    quantize_linears,
    round_to_int8,
)
from app.worker.execution.torch.int8_linear import int8_linear
from app.worker.loaded_model import LoadedModel
from app.worker.loading.context_length import derive_context_length
from app.worker.loading.generation_settings import GENERATION_FILE, read_generation_settings
from app.worker.loading.load_failure import first_words
from app.worker.loading.load_progress import OnBytes
from app.worker.loading.memory_check import check_memory
from app.worker.loading.model_files import LoadError, UnsupportedError, gguf_file
from app.worker.loading.model_folder import find_folder
from app.worker.loading.pretrained import load_config, load_weights
from app.worker.loading.quantized_checkpoints import bitsandbytes_config, check_method, check_quantization
from app.worker.loading.stage_deadline import within_deadline
from app.worker.loading.tokenizer import grammar_vocabulary, load_tokenizer, sample_ids
from app.worker.loading.weight_checks import check_scores

log = logging.getLogger(__name__)

MAX_PROBE_TOKENS = 24
"""Tokens of the text whose scores are checked."""


def load(
    spec: ModelSpec,
    tokenizer_folder: str,
    on_stage: Callable[[str], None],
    *,
    hub_token: str | None = None,
    on_bytes: OnBytes = lambda done, total: None,
) -> LoadedModel:
    """Load the model and save its tokenizer in `tokenizer_folder`.

    Args:
        hub_token: for the hub, in place of the environment's.
        on_bytes: is called with the bytes of a stage that are done and that there are, from any thread.
    Raises: LoadError: this service cannot run it.  Other errors (out of memory, a damaged file) as they come;
        `load_failure` formats them in one line.
    """
    on_stage("files")
    folder, revision = find_folder(spec, hub_token=hub_token, on_bytes=on_bytes)
    device = choose_device(spec.device)
    config = _readable_config(folder, spec, device)
    on_stage("tokenizer")
    tokenizer = within_deadline("tokenizer", partial(load_tokenizer, folder, tokenizer_folder))
    on_stage("weights")
    context_length = derive_context_length(config, spec.max_model_len)
    dtype = choose_dtype(spec, device, config)
    copies = _weight_copies(spec, folder, dtype, device, config=config, context_length=context_length)
    bits = bitsandbytes_config(spec.quantization, dtype)
    quantized: dict[str, Any] = {"quantization_config": bits} if bits is not None else {}
    model = load_weights(AutoModelForCausalLM, folder, config, dtype, on_bytes=on_bytes, **quantized)
    vocab_size = model.get_input_embeddings().num_embeddings
    sample = sample_ids(tokenizer, vocab_size, context_length)
    parameters = sum(weight.numel() for weight in model.parameters())
    linears = linear_shapes(model)
    logprob_shift = _quantize(model, sample, spec) if spec.quantization == "int8" else None
    settings = read_generation_settings(folder, model, tokenizer, vocab_size)
    text_generation = _pipeline(model, tokenizer, device)
    check_scores(text_generation.model, sample[:MAX_PROBE_TOKENS])
    return LoadedModel(
        pipeline=text_generation,
        folder=folder,
        revision=revision,
        device=device,
        dtype=str(model.dtype).removeprefix("torch."),
        context_length=context_length,
        vocab_size=vocab_size,
        parameters=parameters,
        end_ids=settings.end_ids,
        pad_id=next(each for each in (tokenizer.pad_token_id, *settings.end_ids, 0) if each in range(vocab_size)),
        recommended=settings.recommended,
        rules=settings.rules,
        stop_strings=settings.stop_strings,
        logprob_shift=logprob_shift,
        weight_copies=copies,
        linears=linears,
        vocabulary=grammar_vocabulary(tokenizer_folder, vocab_size),
    )


def _readable_config(folder: Path, spec: ModelSpec, device: str) -> Any:
    """Return the configuration of a model whose weights can be read and computed with on this device.

    Raises: LoadError: they cannot, or it is no model that is served.
    """
    if gguf_file(folder) is not None:
        check_method("gguf", device)
    config = within_deadline("configuration", partial(_config, folder))
    check_quantization(getattr(config, "quantization_config", None), spec.quantization, device)
    return config


def _config(folder: Path) -> Any:
    """Return the configuration of a model that is served.  Raises: LoadError."""
    config = load_config(folder)
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedError(f"config.json: {config.model_type} is not a decoder-only language model")
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    names = {kind.__name__ for kind in (known if isinstance(known, tuple) else (known,))}
    named = config.architectures or [*names]
    if not any(name in names or name.endswith(("ForCausalLM", "LMHeadModel")) for name in named):
        raise UnsupportedError(f"config.json: {', '.join(named)[:100]} is not a decoder-only language model")
    if (folder / GENERATION_FILE).exists():
        try:
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise LoadError(f"{GENERATION_FILE}: {first_words(error)}") from error
    return config


def _weight_copies(
    spec: ModelSpec, folder: Path, dtype: torch.dtype | str, device: str, *, config: Any, context_length: int
) -> int:
    """Return how many forms of the weights there may be in memory at once, as far as that is free.

    Raises: NoMemoryError: not even one fits.
    """
    # On other devices, and where nothing is compiled, there is only one.
    several = device == "cpu" and spec.compile == "auto" and spec.engine != "serial"
    wanted = spec.max_weight_copies if several else 1
    copies = check_memory(
        folder, dtype, device, spec.quantization, config=config, context_length=context_length, copies=wanted
    )
    if copies < wanted:
        log.warning("model.max_weight_copies: memory has room for %d", copies)
    return copies


def _pipeline(model: Any, tokenizer: Any, device: str) -> TextGenerationPipeline:
    # The model's own sampling defaults would fill in whatever a request leaves open.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    # Quantized weights are on their device already.
    place = None if getattr(model, "hf_device_map", None) else device
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device=place)


def choose_device(requested: str) -> str:
    """Raises: LoadError: this machine has no such device."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if requested == "auto":
        return next(name for name, usable in available.items() if usable)
    if not available[requested]:
        raise UnsupportedError(f"this machine has no usable device {requested}")
    return requested


def choose_dtype(spec: ModelSpec, device: str, config: Any) -> torch.dtype | str:
    """Return the type to compute in; "auto" is the checkpoint's own."""
    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)  # type: ignore[no-any-return]
    if device != "cpu":
        return "auto"
    checkpoint_dtype = getattr(config.get_text_config(decoder=True), "dtype", None)
    # Native int8 kernels compute in float32 only, and torch's integers are far slower for single tokens.
    native_int8 = spec.quantization == "int8" and spec.compile != "none" and native_linears_unavailable() is None
    # Without instructions for it, arithmetic in 16 bits takes up to 16 times as long as in 32.
    return "auto" if checkpoint_dtype == torch.bfloat16 and cpu_has_bfloat16() and not native_int8 else torch.float32


def _quantize(model: Any, sample_ids: list[int], spec: ModelSpec) -> float:
    """Quantize to int8 and return by how much that changes log-probabilities."""
    quantize = round_to_int8 if _has_native_int8(model, spec) else int8_linear
    try:
        return round(quantize_linears(model, torch.tensor([sample_ids]), quantize), 4)
    except QuantizationError as error:
        raise UnsupportedError(f"int8 is not available here: {error}") from None


def _has_native_int8(model: Any, spec: ModelSpec) -> bool:
    """Return whether the native kernels will compute the model's linear layers."""
    if spec.compile == "none" or model.dtype != torch.float32:
        return False
    if (reason := native_linears_unavailable()) is not None:
        log.warning("int8 is left to torch: %s", reason)
    return reason is None
