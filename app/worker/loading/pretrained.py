"""Loads configurations and weights by transformers: from files of this machine, without code of the model's own."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from app.worker.loading.load_failure import first_words
from app.worker.loading.load_progress import OnBytes, weights_progress
from app.worker.loading.model_files import (
    LoadError,
    UnsupportedError,
    check_files,
    gguf_file,
    stored_numbers,
    tensor_shape,
)
from app.worker.loading.quantized_checkpoints import gguf_numbers
from app.worker.loading.weight_checks import check_finite, check_loading, check_size


def load_config(folder: Path) -> Any:
    """Return a model's configuration, once all small files have been checked.

    Raises: LoadError: a file is wrong, or the model needs code of its own.
    """
    check_files(folder)
    try:
        # Whatever the file says of `return_dict`: the scores are read by their name.
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, return_dict=True, **gguf_argument(folder)
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedError("config.json: it needs Python code of its own, which is never run") from None
        raise LoadError(f"config.json: {first_words(error)}") from error


def gguf_argument(folder: Path) -> dict[str, str]:
    """Return transformers' argument that names the GGUF file of a folder; nothing where it has ordinary weights."""
    packed = gguf_file(folder)
    return {} if packed is None else {"gguf_file": packed.name}


def load_weights(
    kind: Any,
    folder: Path,
    config: Any,
    dtype: torch.dtype | str,
    *,
    on_bytes: OnBytes = lambda done, total: None,
    unused: Callable[[str], bool] = lambda name: False,
    **arguments: Any,
) -> Any:
    """Return the model with the weights of the files, all of them and no others.

    Args:
        kind: the class that makes it.
        unused: whether the files may hold a tensor, by its name, that the model does not use.
        arguments: further ones of `from_pretrained`.
    Raises: LoadError: they are not the ones that the configuration describes.
    """
    packed = gguf_file(folder)
    check_size(config, stored_numbers(folder) if packed is None else gguf_numbers(packed), kind)
    try:
        with weights_progress(folder, on_bytes) if packed is None else nullcontext():
            model, info = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                **({"use_safetensors": True} if packed is None else gguf_argument(folder)),
                local_files_only=True,
                output_loading_info=True,
                # Reported, with their names and shapes, by `check_loading`.
                ignore_mismatched_sizes=True,
                **arguments,
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise LoadError("config.json: describes a model that does not fit into memory") from error
        what = "quantization_config" if getattr(config, "quantization_config", None) else "it and the weights"
        raise LoadError(
            f"config.json: {what} cannot be loaded ({type(error).__name__}: {first_words(error)})"
        ) from error
    unexpected = {name for name in info["unexpected_keys"] if not unused(name)}
    check_loading(
        model,
        {**info, "unexpected_keys": unexpected},
        partial(tensor_shape, folder) if packed is None else lambda name: (),
    )
    check_finite(model)
    model.eval()
    return model
