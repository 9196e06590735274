"""Loads a model that embeds texts from a folder or the hub: an encoder, or a decoder's body, without a language head.

The same models are refused as by `loading/loader.py`: no remote code, no pickled weights, no adapters.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING, AutoModel, AutoModelForTextEncoding

from app.embeddings import EmbeddingInfo
from app.ipc.messages import ModelSpec
from app.worker.embedding.pooling import Head
from app.worker.embedding.sentence_modules import SentenceModules, read_sentence_modules
from app.worker.loading.load_progress import OnBytes
from app.worker.loading.loader import choose_device, choose_dtype
from app.worker.loading.memory_check import check_memory
from app.worker.loading.model_files import CONTEXT_FIELDS, LoadError, one_line
from app.worker.loading.model_folder import HUB_FILES, find_folder
from app.worker.loading.pretrained import load_config, load_weights
from app.worker.loading.stage_deadline import within_deadline
from app.worker.loading.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

HUB_IGNORED_FILES = ("onnx/*", "openvino/*", "consolidated*")
"""Other formats of the same weights; the folders of the modules are needed."""
MAX_REASON_CHARS = 300
DEFAULT_MAX_TOKENS = 512
"""For models whose files name no limit."""
PROBE_TOKENS = 8
"""Tokens of the text with which a model shows that it works."""
POOLER = "pooler."
"""Beginning of the names of weights that only a classifier uses."""


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """A model in memory that embeds; an `Encoder`."""

    model: Any
    head: Head
    info: EmbeddingInfo
    folder: Path
    """Where its files are."""
    revision: str | None
    device: str
    vocab_size: int
    parameters: int
    pad_id: int

    @property
    def dtype(self) -> str:
        """Return the type in which it computes."""
        return str(self.model.dtype).removeprefix("torch.")

    def pad(self, token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return texts as token ids and mask."""
        return pad_right(token_ids, self.pad_id, self.device)

    def hidden_states(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Run the model."""
        states: Tensor = self.model(input_ids=token_ids, attention_mask=mask.long()).last_hidden_state
        return states


class _Tokenizer(Protocol):
    """What is asked of transformers' tokenizer."""

    backend_tokenizer: Any
    model_max_length: int
    pad_token_id: int | None


def pad_right(token_ids: Sequence[Sequence[int]], pad_id: int, device: str) -> tuple[Tensor, Tensor]:
    """Return texts as one tensor of token ids and one that is true where they are, both (texts, tokens)."""
    longest = max(map(len, token_ids))
    padded = [[*ids, *[pad_id] * (longest - len(ids))] for ids in token_ids]
    lengths = torch.tensor([len(ids) for ids in token_ids])
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    return torch.tensor(padded).to(device), mask.to(device)


def load_encoder(
    spec: ModelSpec,
    tokenizer_folder: str,
    on_stage: Callable[[str], None],
    *,
    hub_token: str | None = None,
    on_bytes: OnBytes = lambda done, total: None,
) -> LoadedEncoder:
    """Load the model and save its tokenizer in `tokenizer_folder`.

    Args:
        hub_token: for the hub, in place of the environment's.
        on_bytes: is called with the bytes of a download that are done and that there are, from any thread.
    Raises: LoadError: this service cannot run it.  Other errors as they come; `load_failure` formats them.
    """
    on_stage("files")
    folder, revision = find_folder(spec, HUB_FILES, HUB_IGNORED_FILES, hub_token=hub_token, on_bytes=on_bytes)
    modules = within_deadline("modules", partial(read_sentence_modules, folder))
    config = within_deadline("configuration", partial(_config, modules.transformer))
    device = choose_device(spec.device)
    on_stage("tokenizer")
    adapt = _lowercase if modules.lowercase else None
    tokenizer = within_deadline("tokenizer", partial(load_tokenizer, modules.transformer, tokenizer_folder, adapt))
    on_stage("weights")
    dtype = choose_dtype(spec, device, config)
    check_memory(modules.transformer, dtype, device)
    model = _model(modules.transformer, config, dtype).to(device)
    for module in modules.head.steps:
        if hasattr(module, "linear"):
            module.linear.to(device)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    encoder = LoadedEncoder(
        model=model,
        head=modules.head,
        info=_info(spec, modules, _max_tokens(spec, modules, tokenizer, model), config),
        folder=folder,
        revision=revision,
        device=device,
        vocab_size=model.get_input_embeddings().num_embeddings,
        parameters=sum(weight.numel() for weight in model.parameters()),
        pad_id=pad_id,
    )
    on_stage("first vector")
    return replace(encoder, info=replace(encoder.info, dimension=_probe(encoder)))


def _config(folder: Path) -> Any:
    config = load_config(folder)
    if _class(config) is None:
        raise LoadError(f"config.json: {config.model_type} is no model of texts alone")
    # One that generates would keep what only generation needs.
    config.use_cache = False
    return config


def _class(config: Any) -> Any:
    """Return the class that loads a model's encoder; None where it has none of texts."""
    named: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    if getattr(named, "__name__", "").endswith("EncoderModel"):
        return AutoModelForTextEncoding  # of T5 and its relatives, whose configuration may hide the decoder
    return None if config.is_encoder_decoder else AutoModel


def _model(folder: Path, config: Any, dtype: torch.dtype | str) -> Any:
    """Return the model with the weights of the files; a pooler, which nothing here uses, is left out."""
    kind = _class(config)
    return load_weights(
        kind, folder, config, dtype, unused=lambda name: POOLER in name, **_without_pooler(config, kind)
    )


def _without_pooler(config: Any, kind: Any) -> dict[str, Any]:
    if kind is not AutoModel:
        return {}
    found: Any = MODEL_MAPPING.get(type(config), None)
    takes = isinstance(found, type) and "add_pooling_layer" in inspect.signature(found).parameters
    return {"add_pooling_layer": False} if takes else {}


def _lowercase(tokenizer: _Tokenizer) -> None:
    """Let a tokenizer lowercase whatever it reads."""
    backend = tokenizer.backend_tokenizer
    before = [normalizers.Lowercase()]
    backend.normalizer = normalizers.Sequence([*before, backend.normalizer] if backend.normalizer else before)


def _max_tokens(spec: ModelSpec, modules: SentenceModules, tokenizer: _Tokenizer, model: Any) -> int:
    """Return the tokens of the longest text: what the modules say, else the tokenizer and the model, or less."""
    config = model.config.get_text_config(decoder=True)
    positions = next((int(value) for name in CONTEXT_FIELDS if (value := getattr(config, name, None))), None)
    table: Any = next((each for name, each in model.named_modules() if name.endswith("position_embeddings")), None)
    if positions is not None and getattr(table, "padding_idx", None) is not None:
        # Such models number positions from behind the padding's.
        positions -= table.padding_idx + 1
    named = modules.max_tokens or min(tokenizer.model_max_length, positions or DEFAULT_MAX_TOKENS)
    if positions is not None and named > positions:
        log.warning("max_seq_length is %d, but the model has %d positions", named, positions)
    return min(limit for limit in (named, positions, spec.max_model_len) if limit is not None)


def _info(spec: ModelSpec, modules: SentenceModules, max_tokens: int, config: Any) -> EmbeddingInfo:
    return EmbeddingInfo(
        dimension=0,  # known once it has embedded a text
        max_tokens=max_tokens,
        pooling=modules.head.pooling,
        normalized=modules.head.normalizes,
        dimensions=_dimensions(spec, config),
        prompts=tuple(modules.prompts.items()),
        default_prompt=modules.default_prompt,
        pools_prompt=modules.pools_prompt,
    )


def _dimensions(spec: ModelSpec, config: Any) -> tuple[int, ...] | None:
    """Return to which lengths vectors may be cut, as the settings or the model's files say."""
    if spec.matryoshka is not None:
        return () if spec.matryoshka else None
    named: Any = getattr(config, "matryoshka_dimensions", None)
    if isinstance(named, list) and named and all(type(each) is int and each > 0 for each in named):
        return tuple(sorted(named))
    return () if getattr(config, "is_matryoshka", False) is True else None


@torch.inference_mode()
def _probe(encoder: LoadedEncoder) -> int:
    """Embed a text of a few tokens and return how many numbers its vector has.

    Raises: LoadError: the modules do not fit each other, or the numbers are not finite.
    """
    length = min(PROBE_TOKENS, encoder.info.max_tokens)
    ids, mask = encoder.pad([[number % encoder.vocab_size for number in range(1, length + 1)]])
    try:
        (vector,) = encoder.head(encoder.hidden_states(ids, mask), mask, [None])
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise LoadError(f"it was loaded, but cannot embed a text: {one_line(error, MAX_REASON_CHARS)}") from error
    if not vector.isfinite().all():
        raise LoadError("the model's vectors are not finite; its weights or config.json hold a wrong number")
    return len(vector)
