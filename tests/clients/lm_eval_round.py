"""lm-evaluation-harness against a running service: choices and a text of several windows, from data of our own.

Runs in an environment that has `lm-eval`, `requests`, `aiohttp`, `tenacity` and `tqdm`, and reads the key from
OPENAI_API_KEY.  Ends with an error unless the model finds the right choices; with `--expected`, a file of the numbers
that transformers gives for the same requests, also unless all of them agree to 1e-4, or a millionth of a long text's.
"""

import argparse
import importlib
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

QUESTIONS = [
    ("The capital of France is", [" Paris.", " Berlin.", " Rome.", " Madrid."], 0),
    ("The capital of Italy is", [" Paris.", " Berlin.", " Rome.", " Madrid."], 2),
    ("The capital of Germany is", [" Paris.", " Berlin.", " Rome.", " Madrid."], 1),
]
TEXTS = [
    "Once upon a time there was a little dog. It lived in a house by the sea, and it was happy. " * 6,
    "The capital of France is Paris. The capital of Italy is Rome.",
]
TASKS: dict[str, dict[str, Any]] = {
    "own_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "own_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def write_tasks(folder: Path) -> None:
    """Write the tasks and their data; JSON is YAML too."""
    rows: dict[str, list[dict[str, Any]]] = {
        "own_choices": [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS],
        "own_texts": [{"text": text} for text in TEXTS],
    }
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(data)}, "test_split": "train"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **local, **task}))


def evaluate(url: str, model: str, tokenizer: str, max_length: int) -> dict[str, Any]:
    """Return the harness's results, with every request's own numbers."""
    simple_evaluate: Any = importlib.import_module("lm_eval").simple_evaluate
    tasks: Any = importlib.import_module("lm_eval.tasks")

    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        results: dict[str, Any] = simple_evaluate(
            model="local-completions",
            model_args={
                "base_url": f"{url}/v1/completions",
                "model": model,
                "tokenizer": tokenizer,
                "tokenizer_backend": "huggingface",
                "max_length": max_length,
                "batch_size": 4,
            },
            tasks=list(TASKS),
            task_manager=tasks.TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    return results


def likelihoods(results: dict[str, Any]) -> list[float]:
    """Return the log-likelihoods of all requests, in the order of the data."""
    samples = results["samples"]
    choices = [float(score[0]) for each in _in_order(samples["own_choices"]) for score in each["filtered_resps"]]
    texts = [float(_first(each["filtered_resps"])) for each in _in_order(samples["own_texts"])]
    return choices + texts


def _in_order(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda each: int(each["doc_id"]))


def _first(value: Any) -> Any:
    return _first(value[0]) if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--tokenizer", default="models/tiny-chat")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--expected", type=Path, help="a JSON list of log-likelihoods")
    given = parser.parse_args()

    results = evaluate(given.url, given.model, given.tokenizer, given.max_length)
    found = likelihoods(results)
    accuracy = results["results"]["own_choices"]["acc,none"]
    sys.stdout.write(json.dumps({"likelihoods": found, "accuracy": accuracy}) + "\n")
    if accuracy < 1:
        raise SystemExit("the model does not find the right choices")
    if given.expected is not None:
        expected = json.loads(given.expected.read_text())
        if len(found) != len(expected):
            raise SystemExit(f"{len(found)} likelihoods, {len(expected)} expected")
        if not all(
            math.isclose(mine, other, abs_tol=1e-4, rel_tol=1e-6) for mine, other in zip(found, expected, strict=True)
        ):
            raise SystemExit("the likelihoods are not transformers' own")


if __name__ == "__main__":
    main()
