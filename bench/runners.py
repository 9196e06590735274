"""A worker's own runner in this process, on the model of `bench.model`, for measurements without HTTP."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from app.ipc.messages import ModelSpec
from app.worker.loading.loader import load
from app.worker.process import Runner, make_runner, usable_cores
from bench.process import ROOT


def make_model(folder: Path, shape: str) -> Path:
    """Write the model and return its folder."""
    model = folder / "model"
    command = (sys.executable, "-m", "bench.model", str(model), "--shape", shape)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return model


def load_runner(model: Path, *, threads: int = 0, **settings: Any) -> Runner:
    """Load a model as a worker does.

    Args:
        threads: of torch; 0 takes one for each usable core.
        settings: fields of `ModelSpec`.
    """
    import torch

    torch.set_num_threads(threads or usable_cores())
    spec = ModelSpec(
        name=str(model),
        source="local",
        device="auto",
        dtype="auto",
        revision=None,
        max_model_len=None,
        threads=threads,
        **settings,
    )
    return make_runner(load(spec, str(model), on_stage=lambda _: None), spec)
