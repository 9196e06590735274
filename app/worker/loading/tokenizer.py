"""Load the tokenizer of a model, and refuse those that are of no use or could be made to hang.

Decides what an ordinary text is, on which the model's weights are tried and quantized.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from app.grammars.vocabulary import UnsupportedVocabularyError, Vocabulary, load_vocabulary
from app.worker.execution.quantization import MAX_SAMPLE_TOKENS, SAMPLE_TEXT
from app.worker.loading.load_failure import first_words
from app.worker.loading.model_files import LoadError, UnsupportedError, gguf_file
from app.worker.loading.pretrained import gguf_argument
from app.worker.loading.tokenizer_packages import missing_package

log = logging.getLogger(__name__)

PROBES = tuple(
    f"{text * 40}{end}" for text in ("a", "A", "1", " ", "\n", ".", "'", "é", "中", "aA", "a ", "1a") for end in "b!"
)
"""Texts on which an expression with too many ways to match shows it."""
PROBE_SECONDS = 0.5
"""Processor time for one of them; others take less than a thousandth of it."""


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


def grammar_vocabulary(folder: str, vocab_size: int) -> Vocabulary | None:
    """Return what each token of a saved tokenizer writes; None where no grammar can be enforced with it."""
    try:
        return load_vocabulary(folder, vocab_size)
    except UnsupportedVocabularyError as error:
        log.warning("tokenizer.json: no grammar can be enforced with it (%s)", first_words(error))
        return None


def sample_ids(tokenizer: Any, vocab_size: int, context_length: int) -> list[int]:
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
