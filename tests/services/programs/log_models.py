"""Logs models to an MLflow server; runs in MLflow's environment, with torch and transformers from that of the tests.

Arguments: the server's address, the folder of a model, and the folders of Python packages to add.  Prints the URI of
each model that it has logged, by what it is, as JSON.
"""

import json
import sys
import tempfile
from pathlib import Path

ADDRESS, FOLDER = sys.argv[1:3]
sys.path += sys.argv[3:]

import mlflow  # noqa: E402
import torch  # noqa: E402
from mlflow.pyfunc import PythonModel  # noqa: E402
from transformers import pipeline  # noqa: E402


class Repeat(PythonModel):
    """A model that is code, stored by pickling it."""

    def predict(self, context, model_input, params=None):
        return model_input


def variant(change) -> object:
    """Return the model with other weights."""
    model = pipeline("text-generation", FOLDER)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.model.parameters():
            change(weight)
    return model


def log(model: object, **options: object) -> str:
    with mlflow.start_run() as run:
        mlflow.log_metrics({"loss": 1.5, "accuracy": 0.75})
        logged = mlflow.transformers.log_model(model, name="model", pip_requirements=[], **options)
        return f"{logged.model_uri} {run.info.run_id}"


def main() -> None:
    mlflow.set_tracking_uri(ADDRESS)
    with tempfile.TemporaryDirectory() as code:
        (Path(code) / "helper.py").write_text("raise SystemExit\n")
        logged = {
            "model": log(pipeline("text-generation", FOLDER)),
            "variant": log(variant(lambda weight: weight.add_(torch.randn_like(weight) * weight.std() * 2))),
            "broken": log(variant(lambda weight: weight.fill_(float("nan")))),
            "with code": log(pipeline("text-generation", FOLDER), code_paths=[code]),
        }
    with mlflow.start_run() as run:
        pickled = mlflow.pyfunc.log_model(name="model", python_model=Repeat(), pip_requirements=[])
        logged["pickled"] = f"{pickled.model_uri} {run.info.run_id}"
    sys.stdout.write(json.dumps(logged))


main()
