"""Load a model from a folder or the hub into memory, as a transformers text-generation pipeline.

Decides device, dtype, and which models are refused: no remote code, no pickled weights,
no adapters, nothing but decoder-only language models.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from app.grammars.vocabulary import UnsupportedVocabularyError, Vocabulary, load_vocabulary
from app.ipc.messages import ModelSpec
from app.worker.execution.executor_selection import native_linears_unavailable
from app.worker.execution.linear_modules import linear_shapes
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
from app.worker.loading.context_length import derive_context_length
from app.worker.loading.generation_settings import GENERATION_FILE, read_generation_settings
from app.worker.loading.load_failure import first_words
from app.worker.loading.load_progress import OnBytes
from app.worker.loading.memory_check import check_memory
from app.worker.loading.model_files import LoadError, UnsupportedError, gguf_file
from app.worker.loading.model_folder import find_folder
from app.worker.loading.pretrained import gguf_argument, load_config, load_weights
from app.worker.loading.quantized_checkpoints import bitsandbytes_config, check_method, check_quantization
from app.worker.loading.stage_deadline import within_deadline
from app.worker.loading.tokenizer_packages import missing_package
from app.worker.loading.weight_checks import check_scores

log = logging.getLogger(__name__)

MAX_PROBE_TOKENS = 24
"""Tokens of the text whose scores are checked."""
PROBES = tuple(
    f"{text * 40}{end}" for text in ("a", "A", "1", " ", "\n", ".", "'", "é", "中", "aA", "a ", "1a") for end in "b!"
)
"""Texts on which an expression with too many ways to match shows it."""
PROBE_SECONDS = 0.5
"""Processor time for one of them; others take less than a thousandth of it."""


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
    if gguf_file(folder) is not None:
        check_method("gguf", device)
    config = within_deadline("configuration", partial(_config, folder))
    check_quantization(getattr(config, "quantization_config", None), spec.quantization, device)
    on_stage("tokenizer")
    tokenizer = within_deadline("tokenizer", partial(load_tokenizer, folder, tokenizer_folder))
    on_stage("weights")
    context_length = derive_context_length(config, spec.max_model_len)
    dtype = choose_dtype(spec, device, config)
    copies = check_memory(
        folder,
        dtype,
        device,
        spec.quantization,
        config=config,
        context_length=context_length,
        copies=_wanted_copies(spec, device),
    )
    if copies < _wanted_copies(spec, device):
        log.warning("model.max_weight_copies: memory has room for %d", copies)
    bits = bitsandbytes_config(spec.quantization, dtype)
    quantized: dict[str, Any] = {"quantization_config": bits} if bits is not None else {}
    model = load_weights(AutoModelForCausalLM, folder, config, dtype, on_bytes=on_bytes, **quantized)
    vocab_size = model.get_input_embeddings().num_embeddings
    sample_ids = _sample_ids(tokenizer, vocab_size, context_length)
    parameters = sum(weight.numel() for weight in model.parameters())
    linears = linear_shapes(model)
    logprob_shift = _quantize(model, sample_ids, spec) if spec.quantization == "int8" else None
    settings = read_generation_settings(folder, model, tokenizer, vocab_size)
    # The model's own sampling defaults would fill in whatever a request leaves open.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    # Quantized weights are where they were made.
    place = None if getattr(model, "hf_device_map", None) else device
    text_generation = pipeline("text-generation", model=model, tokenizer=tokenizer, device=place)
    check_scores(text_generation.model, sample_ids[:MAX_PROBE_TOKENS])
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
        vocabulary=_vocabulary(tokenizer_folder, vocab_size),
    )


def _wanted_copies(spec: ModelSpec, device: str) -> int:
    """Return how many forms of the weights may be made; elsewhere there is one."""
    return spec.max_weight_copies if device == "cpu" and spec.compile == "auto" and spec.engine != "serial" else 1


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


def load_tokenizer(folder: Path, save_in: str, adapt: Callable[[Any], None] | None = None) -> Any:
    """Return the tokenizer of a folder, and save it where the parent reads it.

    Args: adapt: changes it before it is saved.
    Raises: LoadError: there is none that can be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **gguf_argument(folder)
        )
    except BaseException as error:
        # The Rust library panics on some files, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            raise UnsupportedError(
                "tokenizer_config.json: it needs Python code of its own, which is never run"
            ) from None
        if not (folder / "tokenizer.json").is_file() and gguf_file(folder) is None:
            if (missing := missing_package(folder, error)) is not None:
                raise UnsupportedError(missing) from error
            raise UnsupportedError("it has no tokenizer.json, and no tokenizer that one can be made of") from error
        raise LoadError(f"tokenizer.json: cannot be read ({first_words(error)})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError("its tokenizer has no fast form (tokenizer.json)")
    # Neither is used here; padding to a billion tokens would be, by what is probed next.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    _check_expressions(tokenizer)
    if adapt is not None:
        adapt(tokenizer)
    tokenizer.save_pretrained(save_in)
    return tokenizer


def _vocabulary(folder: str, vocab_size: int) -> Vocabulary | None:
    try:
        return load_vocabulary(folder, vocab_size)
    except UnsupportedVocabularyError as error:
        log.warning("tokenizer.json: no grammar can be enforced with it (%s)", first_words(error))
        return None


def _check_expressions(tokenizer: Any) -> None:
    """Raises: LoadError: an expression of the tokenizer has too many ways to match an ordinary text."""
    for probe in PROBES:
        started = time.thread_time()
        try:
            tokenizer.backend_tokenizer.encode_batch([probe], add_special_tokens=False)
            slow = time.thread_time() - started > PROBE_SECONDS
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                if type(error) is Exception:  # an unknown word: not every tokenizer has a token for every text
                    continue
                raise
            slow = True
        if slow:
            raise LoadError(f"tokenizer.json: its expressions take too long to split {len(probe)} characters")


def _sample_ids(tokenizer: Any, vocab_size: int, context_length: int) -> list[int]:
    """Return the tokens of an ordinary text.

    Raises: LoadError: the model lacks one of them.
    """
    try:
        ids: list[int] = tokenizer(SAMPLE_TEXT, add_special_tokens=True).input_ids
    except Exception as error:  # noqa: BLE001  # a vocabulary of few words, without one for the unknown
        log.warning("tokenizer.json cannot encode every text: %s", first_words(error))
        ids = []
    if max(ids, default=0) >= vocab_size:
        raise LoadError(
            f"tokenizer.json: ordinary text needs token {max(ids)}, but vocab_size of config.json is {vocab_size}"
        )
    if len(tokenizer) > vocab_size:
        log.warning(
            "tokenizer.json has %d tokens and the model %d; text that needs the others is refused",
            len(tokenizer),
            vocab_size,
        )
    return ids[: min(MAX_SAMPLE_TOKENS, context_length)] or [0]


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
