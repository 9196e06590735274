"""Keeps the measurements of models on disk, so that only the first load of a model on a machine measures.

A file is found by all that decides how long a step takes: the model's configuration and how its weights are stored, the
shapes and the ways, the processor's features and threads, and the versions of the kernels and libraries.  The files are
in the folder of the compiled kernels.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from app.worker.code_folders import in_code_folder
from app.worker.execution.base import ExecutorUnavailableError
from app.worker.execution.native.native_build import UNFINISHED, kernels_digest, processor_features
from app.worker.execution.quantization import fits_float16, fits_int8
from app.worker.execution.way_timing import Measurement
from app.worker.execution.ways import Kind, Shape, TimeTable

log = logging.getLogger(__name__)

FORMAT = 2
"""Changes whenever steps are measured in another way."""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    seconds: dict[str, list[tuple[Kind, int, Annotated[float, msgspec.Meta(gt=0)]]]]
    failures: dict[str, str]


class TimingCache:
    """The file with the measurement of one model."""

    def __init__(self, model: Any, ways: Collection[str], shapes: Sequence[Shape]) -> None:
        """Args: model: with its weights as they were loaded."""
        self._ways = ways
        facts = [FORMAT, version("torch"), version("transformers"), kernels_digest(), sorted(ways), shapes]
        described = json.dumps([facts, _machine(model), _identity(model)], sort_keys=True, default=str)
        self._name = f"step-times-{hashlib.sha256(described.encode()).hexdigest()[:32]}.json"

    def read(self) -> Measurement | None:
        """Return what was measured before; None where there is nothing, or nothing that can be used."""
        try:
            content = in_code_folder(self._content)
            return None if content is None else self._measurement(msgspec.json.decode(content, type=_File))
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.warning("the step times of an earlier load cannot be read, and are measured again: %s", error)
            return None

    def write(self, measured: Measurement) -> None:
        """Keep a measurement, unless there is none, or a way failed for a reason that may be gone the next time."""
        lasting = all(isinstance(error, ExecutorUnavailableError) for error in measured.failures.values())
        if not measured.table.shapes or not lasting:
            return
        seconds = {
            way: [(shape.kind, shape.tokens, each) for shape, each in times.items()]
            for way, times in measured.table.seconds.items()
        }
        failures = {way: str(error) for way, error in measured.failures.items()}
        content = msgspec.json.encode(_File(seconds, failures))
        try:
            in_code_folder(lambda folder: self._write(folder, content))
        except OSError as error:
            log.warning("the step times cannot be kept, and are measured again at the next load: %s", error)

    def _content(self, folder: Path) -> bytes | None:
        path = folder / self._name
        # A folder without the file is no reason to look in the next one.
        return path.read_bytes() if path.exists() else None

    def _write(self, folder: Path, content: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as private:
            file = Path(private) / self._name
            file.write_bytes(content)
            # Atomic: no other process can read half a file.
            file.replace(folder / self._name)

    def _measurement(self, file: _File) -> Measurement:
        """Raises: ValueError: the file is about something else."""
        seconds = {
            way: {Shape(kind, tokens): each for kind, tokens, each in times} for way, times in file.seconds.items()
        }
        decodes = {frozenset(shape for shape in times if shape.kind == "decode") for times in seconds.values()}
        if seconds.keys() | file.failures.keys() != set(self._ways) or len(decodes) > 1:
            raise ValueError("it is not about the same ways")
        failures = {way: ExecutorUnavailableError(reason) for way, reason in file.failures.items()}
        return Measurement(TimeTable({way: seconds[way] for way in self._ways if way in seconds}), failures)


def _machine(model: Any) -> object:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_features()
    return device.type, name, torch.get_num_threads()


def _identity(model: Any) -> object:
    """Return the sizes of a model, and how its weights are stored: another model of the same kind is as fast."""
    facts: Mapping[str, object] = {**model.config.to_dict(), "_name_or_path": None}
    kinds = sorted({type(module).__name__ for module in model.modules()})
    weight = next((each.detach() for name, each in model.named_parameters() if name.endswith("proj.weight")), None)
    fitting = () if weight is None or weight.dtype != torch.float32 else (fits_int8(weight[:1]), fits_float16(weight))
    return facts, str(model.dtype), kinds, fitting
