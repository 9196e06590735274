"""OpenVINO GenAI's continuous batching behind OpenAI's two routes, or alone: a peer of `bench.serve`.

    python -m bench.openvino_server MODEL --dtype bfloat16 --threads 2 [--port 8000]

Runs in an environment of its own (`python -m tests.upstreams.environments openvino`).  The model is exported once,
beside its folder and with its weights as they are.  Without a port it takes jobs on standard input, as
`bench.static_batch` does.
"""

import argparse
import asyncio
import json
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openvino
import openvino_genai

from bench.token_server import serve
from bench.words import token_ids

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
CACHE_GIBIBYTES = 4
"""Of the KV cache: more than the loads need, as vLLM is given."""
Pushed = tuple["asyncio.Queue[list[int] | None]", list[int] | None]


def exported(model: Path) -> Path:
    """Return the model in OpenVINO's format, after exporting it if need be."""
    folder = model.with_name(f"{model.name}-openvino-{version('openvino')}")
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        program = str(Path(sys.executable).with_name("optimum-cli"))
        task = ("--task", "text-generation-with-past")
        command = [program, "export", "openvino", "--model", str(model), *task, str(unfinished)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        unfinished.rename(folder)
    return folder


def make_pipeline(folder: Path, dtype: str, threads: int) -> Any:
    """Load the model with arithmetic and KV cache in one type; by itself OpenVINO may keep the cache in 8 bits."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIBIBYTES
    scheduler.enable_prefix_caching = True
    precision = PRECISIONS[dtype]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": threads,
    }
    return openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)


def greedy(max_tokens: int) -> Any:
    """Return settings for exactly so many tokens."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = max_tokens
    config.ignore_eos, config.do_sample = True, False
    return config


def read(handle: Any) -> list[int]:
    """Return the tokens that a request has got since the last time."""
    if not handle.can_read():
        return []
    return [token for output in handle.read().values() for token in output.generated_ids]


class Batcher:
    """Steps the pipeline in a thread, and hands each request its tokens as they come."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._new: queue.SimpleQueue[tuple[Any, int, asyncio.Queue[list[int] | None]]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    async def tokens(self, ids: Sequence[int], max_tokens: int) -> AsyncIterator[list[int]]:
        """Yield the tokens that follow these, in portions."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()
        portions: asyncio.Queue[list[int] | None] = asyncio.Queue()
        self._new.put((openvino.Tensor([list(ids)]), max_tokens, portions))
        while (portion := await portions.get()) is not None:
            yield portion

    def _run(self) -> None:
        live: list[tuple[Any, asyncio.Queue[list[int] | None]]] = []
        number = 0
        while True:
            while not live or not self._new.empty():
                ids, max_tokens, portions = self._new.get()
                live.append((self._pipeline.add_request(number, ids, greedy(max_tokens)), portions))
                number += 1
            self._pipeline.step()
            pushed: list[Pushed] = [(portions, found) for handle, portions in live if (found := read(handle))]
            running = openvino_genai.GenerationStatus.RUNNING
            pushed += [(portions, None) for handle, portions in live if handle.get_status() != running]
            live = [each for each in live if each[0].get_status() == running]
            if self._loop is not None:
                self._loop.call_soon_threadsafe(_push, pushed)


def _push(pushed: Sequence[Pushed]) -> None:
    for portions, found in pushed:
        portions.put_nowait(found)


def answer_jobs(pipeline: Any) -> None:
    """Print "ready", and for each line of standard input the seconds that its batch takes."""
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        draw = random.Random(job["seed"])
        prompts = [openvino.Tensor([list(token_ids(draw, job["prompt"]))]) for _ in range(job["batch"])]
        began = time.perf_counter()
        handles = [pipeline.add_request(number, ids, greedy(job["new"])) for number, ids in enumerate(prompts)]
        found = [0 for _ in handles]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            found = [count + len(read(handle)) for count, handle in zip(found, handles, strict=True)]
        print(time.perf_counter() - began, flush=True)
        if found != [job["new"] for _ in handles]:
            raise RuntimeError(f"{job['new']} tokens were wanted, and {found} came")


def main() -> None:
    """Export and load the model, and serve it or take jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=PRECISIONS, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    pipeline = make_pipeline(exported(arguments.model), arguments.dtype, arguments.threads)
    if arguments.port is None:
        answer_jobs(pipeline)
    else:
        serve(Batcher(pipeline), arguments.model, arguments.port)


if __name__ == "__main__":
    main()
