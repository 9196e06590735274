"""The small files of a model folder, checked before transformers reads them: transformers ignores some faults in
silence and reports others without the name of the file.

Decides what a JSON file may hold and which weight files are read.  Reads no weights but their headers.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from app.ipc.messages import LoadFailure

JSON_BYTES = 64 * 1024**2
"""Largest JSON file that is read; a real configuration has kilobytes, an index of thousands of tensors a megabyte."""
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What the families of models call the number of their layers."""
WHOLE_NUMBERS = (*CONTEXT_FIELDS, *LAYER_FIELDS, "vocab_size", "hidden_size", "num_attention_heads")
MAX_LABELS = 1_000_000
"""Of a classifier, for which transformers makes a list of names when it reads the configuration of any model."""
OPTIONAL_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_BYTES = 1024**2
"""Largest chat template; the longest real ones have thirty thousand."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
SMALL_DTYPES = ("I8", "U8", "F8", "F4", "I4", "U4", "F6")
"""Beginnings of the names of number formats that need scales."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


class LoadError(Exception):
    """The model cannot be served; the message is one line for the operator."""

    reason: ClassVar[LoadFailure] = "bad_file"


class UnsupportedError(LoadError):
    """Nothing is wrong with the model, but it is of a kind that is not served here."""

    reason = "unsupported"


class NoModelError(LoadError):
    """There is no model of this name."""

    reason = "not_found"


class NoMemoryError(LoadError):
    """The model does not fit into the memory that is free."""

    reason = "no_memory"

    def __init__(self, *, needed_bytes: int, free_bytes: int, weights_bytes: int, device: str) -> None:
        where = "memory" if device == "cpu" else f"memory of {device}"
        super().__init__(
            f"it needs {needed_bytes / 1e9:,.2f} GB of {where} ({weights_bytes / 1e9:,.2f} for its weights, the rest "
            f"to compute a request), and {free_bytes / 1e9:,.2f} GB are free"
        )
        self.needed_bytes, self.free_bytes = needed_bytes, free_bytes


def one_line(text: object, limit: int) -> str:
    """Return a text as one line without signs that a terminal obeys; names in a model's files may hold any."""
    words = " ".join(str(text).split())
    return "".join(sign if sign.isprintable() else "?" for sign in words[:limit])


def check_files(folder: Path) -> None:
    """Check every small file of a folder, and the headers of its weights.

    Raises: LoadError: one of them cannot be used; the message names the file and the field.
    """
    if (folder / "adapter_config.json").exists():
        raise UnsupportedError("it is an adapter for another model, not a whole one")
    if gguf_file(folder) is not None:
        return  # it holds the configuration, too
    if not (folder / "config.json").is_file():
        raise NoModelError(f"{folder} has no config.json")
    config = read_json(folder / "config.json")
    _check_config(config)
    for name in OPTIONAL_FILES:
        if (folder / name).exists():
            read_json(folder / name)
    if (folder / "tokenizer_config.json").exists():
        _check_tokenizer_config(read_json(folder / "tokenizer_config.json"))
    _check_template(folder / TEMPLATE_FILE)
    _check_layers(config, [name for file in weight_files(folder) for name in _tensor_names(file, config)])


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises: LoadError: it holds something else, a NaN, or more than a configuration can need.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise LoadError(f"{path.name}: holds no object but {_kind(content)}")
    return content


def read_json_objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a list that a JSON file holds.

    Raises: LoadError: it holds something else, a NaN, or more than a configuration can need.
    """
    content = _read_json(path)
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise LoadError(f"{path.name}: holds no list of objects")
    return content


def _read_json(path: Path) -> Any:

    def refuse(reason: str) -> LoadError:
        return LoadError(f"{path.name}: {reason}")

    try:
        size = path.stat().st_size
        if not path.is_file():
            raise refuse("is not a file")
        if size > JSON_BYTES:
            raise refuse(f"has {size} bytes; at most {JSON_BYTES} are read")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise refuse("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise refuse(f"is not valid JSON ({error.msg} in line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise refuse("is nested too deeply") from None
    except ValueError:  # an integer of thousands of digits
        raise refuse("holds a number that is too long") from None
    if (field := next(_not_finite(content), None)) is not None:
        raise refuse(f"{field} is not a finite number")
    return content


def gguf_file(folder: Path) -> Path | None:
    """Return the GGUF file of a folder without other weights; None where there is none.

    Raises: LoadError: there are several, of which one would have to be chosen.
    """
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise LoadError(f"it has {len(files)} GGUF files; keep the one to load, or take the model's safetensors")
    return files[0] if files else None


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights, as the index names them where there is one.

    Raises: LoadError: there are none, or the index names what is not a file of the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        if any(folder.glob("*.safetensors")):
            raise LoadError(f"it has neither {WEIGHTS} nor {INDEX}")
        raise UnsupportedError("it has no weights in the safetensors format, and no other is read")
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise LoadError(f"{INDEX}: weight_map must be an object with the name of a file for each tensor")
    names = sorted(set(shards.values()))
    for name in names:
        # A name, not a path: links within the folder are the operator's own, and how the hub's cache stores files.
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise LoadError(
                f"{INDEX}: weight_map names a file outside of the folder, or none in the safetensors format"
            )
        if not (folder / name).is_file():
            raise LoadError(f"{INDEX}: weight_map names {name}, which is not there")
    return [folder / name for name in names]


def tensor_shape(folder: Path, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor in the weights; () where there is no such tensor."""
    for path in weight_files(folder):
        with safe_open(path, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  # it is no mapping
                return tuple(tensors.get_slice(name).get_shape())
    return ()


def stored_numbers(folder: Path) -> int:
    """Return how many numbers all tensors in the weights have together."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _tensor_names(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the names of a file's tensors.

    Raises: LoadError: it is damaged, or holds small numbers where no quantization says what they stand for.
    """
    try:
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
            for name in names if config.get("quantization_config") is None else ():
                tensor = tensors.get_slice(name)
                if tensor.get_dtype().startswith(SMALL_DTYPES) and name.endswith(".weight"):
                    raise LoadError(
                        f"{path.name}: {name} is stored as {tensor.get_dtype()}, "
                        "but config.json has no quantization_config that says how to read it"
                    )
            return names
    except SafetensorError as error:
        raise LoadError(f"{path.name}: is damaged or incomplete ({error})") from None
    except OSError as error:
        raise LoadError(f"{path.name}: cannot be read ({error})") from None


def _check_config(config: Mapping[str, Any]) -> None:
    if not isinstance(config.get("model_type"), str):
        raise LoadError("config.json: model_type must name a kind of model")
    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(each, str) for each in architectures)
    ):
        raise LoadError("config.json: architectures must be a list of names")
    sections: tuple[tuple[Any, str], ...] = ((config, ""), (config.get("text_config"), "text_config."))
    for section, prefix in sections:
        for name in WHOLE_NUMBERS if isinstance(section, dict) else ():
            value = section.get(name)
            if value is not None and (type(value) is not int or value < 1):
                raise LoadError(f"config.json: {prefix}{name} must be a whole number above 0")
    labels = config.get("num_labels")
    if labels is not None and (type(labels) is not int or not 0 <= labels <= MAX_LABELS):
        raise LoadError(f"config.json: num_labels must be a whole number up to {MAX_LABELS}")
    if (quantization := config.get("quantization_config")) is not None:
        _check_quantization(quantization)


def _check_tokenizer_config(config: Mapping[str, Any]) -> None:
    for name in NAMED_TOKENS:
        if not isinstance(config.get(name), str | dict | None):
            raise LoadError(f"tokenizer_config.json: {name} must be a text")
    length = config.get("model_max_length")
    if length is not None and type(length) not in (int, float):
        raise LoadError("tokenizer_config.json: model_max_length must be a number")
    templates = config.get("chat_template")
    listed = templates if isinstance(templates, list) else []
    named = isinstance(templates, dict) and all(isinstance(each, str) for each in templates.values())
    if not (templates is None or isinstance(templates, str | list) or named) or not all(
        isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("template"), str)
        for each in listed
    ):
        raise LoadError("tokenizer_config.json: chat_template must be a text, or a list of names and templates")


def _check_template(path: Path) -> None:
    if not path.exists():
        return
    try:
        if not path.is_file() or path.stat().st_size > TEMPLATE_BYTES:
            raise LoadError(f"{path.name}: is not a file of at most {TEMPLATE_BYTES} bytes")
        path.read_text("utf-8")
    except OSError as error:
        raise LoadError(f"{path.name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise LoadError(f"{path.name}: is not UTF-8 text") from None


def _check_quantization(quantization: Any) -> None:
    if not isinstance(quantization, dict):
        raise LoadError(f"config.json: quantization_config holds no object but {_kind(quantization)}")
    if quantization.get("load_in_8bit") or quantization.get("load_in_4bit"):
        return  # the older form of bitsandbytes, which names no method
    method = quantization.get("quant_method")
    if not isinstance(method, str):
        raise LoadError("config.json: quantization_config.quant_method must name a method")
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise UnsupportedError(
            f"config.json: quantization_config.quant_method is {_quoted(method)}, which is not supported"
        )


def _check_layers(config: dict[str, Any], names: list[str]) -> None:
    """Raises: LoadError: there are fewer layers in the weights than the configuration says."""
    numbers = [int(found[1]) for name in names if (found := _LAYER_NUMBER.search(name))]
    sections = [section for section in (config.get("text_config"), config) if isinstance(section, dict)]
    for name in LAYER_FIELDS:
        layers = sections[0].get(name)
        # Nobody should wait until a million layers are built only to find that they are missing.
        if numbers and isinstance(layers, int) and layers > max(numbers) + 1:
            raise LoadError(f"config.json: {name} is {layers}, but the weights hold {max(numbers) + 1}")


def _not_finite(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of numbers that are none; infinity is a limit in a list of two, but no number by itself."""
    if isinstance(value, float):
        if math.isnan(value) or (math.isinf(value) and not path.endswith("]")):
            yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _not_finite(item, f"{path}[]")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "another value")


def _quoted(name: str) -> str:
    """Return a name from a file as it may stand in one line."""
    return repr(name[:60])
