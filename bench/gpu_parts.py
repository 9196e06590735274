"""What `bench.gpu` measures, one part in each process.

    python -m bench.gpu_parts PART RESULTS [--shape 1b|8b] [--dry]

Models have random weights, made on the device.  Results are appended to the file RESULTS as lines of JSON.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from app.ipc.messages import Compile, Submit, TokenEvent
from app.types import SamplingParams
from app.worker.execution.executor_selection import install_graphs, select_executor
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.private_api import attention_implementation
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.loaded_model import LoadedModel
from app.worker.loading.kv_memory import kv_cache_bytes, trial_step_bytes
from app.worker.sampling.device_sampler import DeviceSampler
from app.worker.scheduling.batching_runner import BatchingRunner
from app.worker.scheduling.step_time import GpuStepTime
from app.worker.scheduling.trial_step import compute_largest_step
from bench.gpu_attention import measure_attention
from bench.model import Shape
from bench.static_batch import generate as static_generate
from bench.words import VOCABULARY, token_ids

SHAPES = {"1b": Shape(2048, 8192, 16, 32, 8), "8b": Shape(4096, 14_336, 32, 32, 8, 128)}
DRY_SHAPE = Shape(64, 128, 2, 4, 2, 16)
CONTEXT = 2048
PROMPT, LONG_PROMPT = 105, 1900
LEFT_BYTES = 64 << 20
"""What is left of the GPU's memory while another program has taken it."""
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"temperature": 0.7, "top_k": 40},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logprobs": {"logprobs": 5},
}


class Bench:
    """The device, its sizes, and where results go."""

    def __init__(self, part: str, results: Path, shape: str, dry: bool) -> None:
        self._part, self._results = part, results
        self.shape_name, self.dry = shape, dry
        self.shape = DRY_SHAPE if dry else SHAPES[shape]
        self.device = "cpu" if dry else "cuda"
        self.vocabulary = VOCABULARY if dry else 128_256
        self.sizes = (1, 3) if dry else (1, 8, 32, 128)
        self.steps, self.new = (3, 4) if dry else (40, 64)
        self.long_prompt = 300 if dry else LONG_PROMPT

    def note(self, what: str, **values: object) -> None:
        """Append a result."""
        line = {"part": self._part, "shape": self.shape_name, "what": what, **values}
        with self._results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note an error and go on, unless the device is lost."""
        try:
            yield
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001  # the other figures are worth having all the same
            self.note("failed", of=what, error=f"{type(error).__name__}: {str(error)[:300]}")

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def model(self, dtype: torch.dtype) -> Any:
        """Return a model with random weights."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=self.shape_name == "1b",
            **asdict(self.shape),
        )
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(self.device):
                model: Any = LlamaForCausalLM(config)
                return model.eval()
        finally:
            torch.set_default_dtype(before)


class Driven:
    """A runner that is stepped by hand."""

    def __init__(self, bench: Bench, model: Any, setting: Compile, *, asynchronous: bool = True) -> None:
        """Args: asynchronous: whether a step is launched before the tokens of the last one are read."""
        slots, chunk = bench.sizes[-1], min(CONTEXT, GpuStepTime.MAX_PREFILL_TOKENS)
        step = trial_step_bytes(model, chunk)
        free = min(kv_cache_bytes(bench.device, step_bytes=step), 10**9 if bench.dry else 1 << 62)
        model_runner = create_torch_runner(model, length=CONTEXT, slots=slots, free_bytes=free)
        samplers = list[DeviceSampler]()

        def largest_step(runner: ModelRunner) -> None:
            samplers.append(compute_largest_step(runner, chunk))

        if bench.dry and setting == "auto":
            # The passes and the sampling that a GPU captures, called.
            install_graphs(model_runner, lambda compute: compute)
            largest_step(model_runner)
        else:
            select_executor(model_runner, setting, largest_step=largest_step)
        pipeline: Any = None
        loaded = LoadedModel(
            pipeline=pipeline,
            revision=None,
            device=bench.device,
            dtype=str(model.dtype),
            context_length=model_runner.cache.length,
            vocab_size=bench.vocabulary,
            parameters=0,
            end_ids=(),
            pad_id=0,
        )
        self.runner = BatchingRunner(
            loaded,
            model_runner,
            prefix_reuse=False,
            asynchronous=asynchronous,
            device_sampler=next(iter(samplers), None),
        )
        self._last = 0

    def submit(self, prompt: Sequence[int], **params: Any) -> int:
        """Add a request and return its number."""
        self._last += 1
        self.runner.submit(Submit(self._last, tuple(prompt), SamplingParams(**params)))
        return self._last

    def step(self) -> list[TokenEvent]:
        """Raises: RuntimeError: a request failed."""
        events: list[TokenEvent] = []
        self.runner.step(events.extend)
        for event in events:
            if event.error:
                raise RuntimeError(event.error)
        return events

    def clear(self, numbers: Sequence[int]) -> None:
        """End what is left."""
        for number in numbers:
            self.runner.cancel(number)
        while self.runner.busy:
            self.runner.step(lambda events: None)

    @contextmanager
    def decoding(self, rows: int, **params: Any) -> Iterator[None]:
        """Let so many rows decode, and nothing else, in the steps within."""
        numbers = [self.submit(words(f"{rows}/{row}"), max_tokens=1500, **params) for row in range(rows)]
        try:
            begun = set[int]()
            while len(begun) < rows:
                begun.update(event.id for event in self.step() if event.token_ids)
            for _ in range(5):
                self.step()
            yield
        finally:
            self.clear(numbers)


def words(seed: str, count: int = PROMPT) -> list[int]:
    """Return a prompt."""
    return list(token_ids(random.Random(seed), count))


def median_ms(call: Callable[[], object], times: int) -> float:
    """Return the median time of a call that waits for its result."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return round(1000 * statistics.median(took), 3)


def busy_ms(bench: Bench, call: Callable[[], object], times: int = 6) -> float | None:
    """Return how long the GPU works in a call; None without a GPU."""
    if bench.device != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(times):
            call()
        bench.synchronize()
    kernels: float = sum(each.self_device_time_total for each in found.key_averages())
    return round(kernels / 1000 / times, 3)


def measure_steps(bench: Bench, setting: Compile) -> None:
    """Decoding steps, whole answers and a long prompt, and what sampling settings cost a step."""
    model = bench.model(torch.float32 if bench.dry else torch.bfloat16)
    began = time.perf_counter()
    driven = Driven(bench, model, setting)
    seconds = round(time.perf_counter() - began, 1)
    taken = round(torch.cuda.memory_reserved() / 1e9, 2) if bench.device == "cuda" else None
    bench.note("load", seconds=seconds, compiled=driven.runner.compiled, slots=driven.runner.slots, reserved_gb=taken)
    for rows in bench.sizes:
        note_step(bench, driven, rows)
        with bench.attempt(f"answers of {rows} rows"):
            bench.note("answers", rows=rows, **answers(bench, driven, rows))
    with bench.attempt("long prompt"):
        first = [answers(bench, driven, 1, prompt=bench.long_prompt + number, new=1)["wall_s"] for number in range(3)]
        ids = torch.tensor([words("one", bench.long_prompt)], device=bench.device)
        before = attention_implementation(model)
        model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            one = median_ms(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax().item(), 3)
        model.set_attn_implementation(before)
        bench.note("long prompt", tokens=bench.long_prompt, ms=round(1000 * min(first), 1), one_pass_ms=one)
    for name, params in SETTINGS.items():
        with bench.attempt(name):
            for rows in bench.sizes[1::2]:
                with driven.decoding(rows, **params):
                    bench.note("sampling", setting=name, rows=rows, ms=median_ms(driven.step, bench.steps))


def note_step(bench: Bench, driven: Driven, rows: int) -> None:
    """Measure a decoding step of so many rows."""
    with bench.attempt(f"{rows} rows"), driven.decoding(rows):
        step, busy = median_ms(driven.step, bench.steps), busy_ms(bench, driven.step)
        bench.note("step", rows=rows, ms=step, busy_ms=busy, over_busy=busy and round(step / busy, 2))


def measure_synchronous(bench: Bench) -> None:
    """Decoding steps each of which is read before the next is launched: what the host takes between them."""
    driven = Driven(bench, bench.model(torch.float32 if bench.dry else torch.bfloat16), "auto", asynchronous=False)
    for rows in bench.sizes:
        note_step(bench, driven, rows)


def answers(
    bench: Bench, driven: Driven, rows: int, *, prompt: int = PROMPT, new: int | None = None
) -> dict[str, float]:
    """Let requests that come at once be answered, twice, and return the faster round's figures."""
    rounds = []
    for number in range(2):
        began, first, tokens = time.perf_counter(), dict[int, float](), 0
        for row in range(rows):
            driven.submit(words(f"{number}/{row}/{prompt}", prompt), max_tokens=new or bench.new)
        while driven.runner.busy:
            for event in driven.step():
                tokens += len(event.token_ids)
                if event.token_ids:
                    first.setdefault(event.id, time.perf_counter() - began)
        wall = time.perf_counter() - began
        rounds.append(
            {"tokens_s": round(tokens / wall, 1), "wall_s": round(wall, 4), "first_s": round(max(first.values()), 4)}
        )
    return min(rounds, key=lambda each: each["wall_s"])


def measure_peers(bench: Bench) -> None:
    """A static batch loop, and transformers' continuous batching as it comes and with CUDA graphs."""
    model = bench.model(torch.float32 if bench.dry else torch.bfloat16)
    model.set_attn_implementation("sdpa")
    for rows in bench.sizes:
        with bench.attempt(f"static loop, {rows} rows"):
            ids = torch.tensor([words(f"s/{row}") for row in range(rows)], device=bench.device)
            static_generate(model, ids, 4)
            ms = median_ms(lambda ids=ids: static_generate(model, ids, bench.new), 2)  # type: ignore[misc]
            bench.note("peer", peer="static loop", rows=rows, tokens_s=round(1000 * rows * bench.new / ms, 1))
    for name, more in {"continuous batching": {}, "continuous batching, graphs": {"use_cuda_graph": True}}.items():
        if not bench.dry:
            with bench.attempt(name):
                _continuous_batching(bench, model, name, more)


def _continuous_batching(bench: Bench, model: Any, name: str, more: dict[str, Any]) -> None:
    generation = GenerationConfig(max_new_tokens=bench.new, do_sample=False, eos_token_id=-1, pad_token_id=2)
    batching = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=2048, **more)
    manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
    manager.warmup()
    manager.start()
    try:
        for rows in bench.sizes:
            walls = []
            for number in range(3):
                began = time.perf_counter()
                prompts = [words(f"c/{number}/{row}") for row in range(rows)]
                wanted = set(manager.add_requests(prompts, max_new_tokens=bench.new))
                while wanted:
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        wanted.discard(result.request_id)
                    if time.perf_counter() - began > 60:
                        raise TimeoutError(f"{len(wanted)} of {rows} are not finished after a minute")
                walls.append(time.perf_counter() - began)
            bench.note("peer", peer=name, rows=rows, tokens_s=round(rows * bench.new / min(walls[1:]), 1))
    finally:
        manager.stop(block=True, timeout=10)


@torch.inference_mode()
def measure_equality(bench: Bench) -> None:
    """Greedy answers in float32 beside those of `generate`, alone and in a batch."""
    bench.shape = DRY_SHAPE if bench.dry else Shape(576, 1536, 10, 9, 3)
    model = bench.model(torch.float32)
    prompts = [words(f"e/{length}", length) for length in range(5, 117, 40 if bench.dry else 7)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=bench.device)
        whole = model.generate(ids, max_new_tokens=bench.new, do_sample=False, pad_token_id=0)
        expected.append(whole[0, len(prompt) :].tolist())
    driven = Driven(bench, model, "auto")
    generated: dict[int, list[int]] = {}
    for batch in (*([prompt] for prompt in prompts), prompts):
        generated |= {driven.submit(prompt, max_tokens=bench.new): [] for prompt in batch}
        while driven.runner.busy:
            for event in driven.step():
                generated[event.id] += event.token_ids
    found, count = list(generated.values()), len(prompts)
    single, batched = found[:count], found[count:]
    bench.note(
        "equality",
        compiled=driven.runner.compiled,
        prompts=count,
        single=sum(one == other for one, other in zip(single, expected, strict=True)),
        batched=sum(one == other for one, other in zip(batched, expected, strict=True)),
    )


def measure_memory(bench: Bench) -> None:
    """How requests end while the GPU's memory is taken, and after it has been given back."""
    driven = Driven(bench, bench.model(torch.float32 if bench.dry else torch.bfloat16), "auto")
    taken: list[torch.Tensor] = []
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        left = torch.cuda.mem_get_info()[0] - LEFT_BYTES
        taken.append(torch.empty(max(0, left), dtype=torch.uint8, device="cuda"))
    for moment in ("memory gone", "memory back"):
        for row in range(bench.sizes[-1]):
            length = bench.long_prompt if row % 4 == 0 else PROMPT
            driven.submit(words(f"m/{row}", length), max_tokens=bench.new)
        ends: dict[str, int] = {}
        while driven.runner.busy:
            events: list[TokenEvent] = []
            driven.runner.step(events.extend)
            for event in events:
                if end := event.finish or event.error:
                    ends[end] = ends.get(end, 0) + 1
        bench.note(moment, ends=ends)
        taken.clear()
        if bench.device == "cuda":
            torch.cuda.empty_cache()


PARTS: dict[str, Callable[[Bench], None]] = {
    "steps": lambda bench: measure_steps(bench, "auto"),
    "synchronous": measure_synchronous,
    "uncaptured": lambda bench: measure_steps(bench, "none"),
    "compiled": lambda bench: measure_steps(bench, "none" if bench.dry else "layers"),
    "peers": measure_peers,
    "equality": measure_equality,
    "memory": measure_memory,
    "attention": lambda bench: measure_attention(bench.note, bench.attempt, bench.shape, bench.device, bench.sizes),
}


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("results", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    bench = Bench(given.part, given.results, given.shape, given.dry)
    with bench.attempt(given.part):
        PARTS[given.part](bench)


if __name__ == "__main__":
    main()
