"""Ways of execution are timed on some layers of a real model, and installed as the times say."""

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.ipc.interpreter import CODE_FOLDERS
from app.ipc.messages import Ready, decode_from_worker, encode
from app.worker.execution import way_timing
from app.worker.execution.base import ExecutorUnavailableError, OptionalExecutor
from app.worker.execution.executor_selection import WaySelection, cpu_layouts, install_verified
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.model_sample import sample_model, shared_copy
from app.worker.execution.native.packed_linear import gemm_kernels
from app.worker.execution.packed_batch import PackedBatch, Segment
from app.worker.execution.torch.equivalence import torch_runner
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.execution.transformers_forward import TransformersForward
from app.worker.execution.way_timing import Measurement, WayTimer, shapes_of
from app.worker.execution.ways import Layout, MeasuredExecutor, Shape, TimeTable
from app.worker.ready import model_ready
from app.worker.scheduling.batching_runner import BatchingRunner
from tests.unit.worker.families import CONTEXT, FAMILIES, VOCABULARY, loaded, make
from tests.unit.worker.lora_adapters import adapted
from tests.unit.worker.test_lora import mixed_passes, scores

NATIVE, TORCH = "native layers", "torch linears, torch attention"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tables are kept: no other test's are found."""
    monkeypatch.setattr("app.worker.execution.timing_cache.in_code_folder", lambda use: use(tmp_path))
    monkeypatch.setattr(way_timing, "waited_seconds", lambda: 0)  # however busy the machine of the tests is
    monkeypatch.setattr(way_timing, "time", Clock)
    return tmp_path


class Clock:
    """The real one and what ways delay: so much that nothing else on the machine takes as long."""

    delays = 0.0

    @classmethod
    def perf_counter(cls) -> float:
        return time.perf_counter() + cls.delays


def runner_of(family: str = "llama", dtype: torch.dtype = torch.float32, slots: int = 8) -> ModelRunner:
    return create_torch_runner(make(FAMILIES[family]).to(dtype), length=CONTEXT, slots=slots, free_bytes=10**9)


class Delayed(TransformersForward):
    """Takes longer for each step of some kind."""

    def __init__(self, model: Any, cache: KVCache, delays: Callable[[PackedBatch], bool]) -> None:
        super().__init__(model, cache)
        self.delays = delays
        self.installed = False
        self.sizes: list[int] = []

    def install(self) -> None:
        self.installed = True

    def forward(self, batch: PackedBatch) -> Tensor:
        self.sizes.append(batch.size)
        if self.delays(batch):
            Clock.delays += 5
        return super().forward(batch)


def is_decode(batch: PackedBatch) -> bool:
    return len(batch.segments) == batch.size


def delayed(name: str, delays: Callable[[PackedBatch], bool]) -> Layout:
    return Layout(name, lambda model, cache: {name: Delayed(model, cache, delays)})


def always(_batch: PackedBatch) -> bool:
    return True


def never(_batch: PackedBatch) -> bool:
    return False


def select(runner: ModelRunner, *layouts: Layout, copies: int = 1) -> None:
    WaySelection(runner, layouts).select(copies)


def test_a_way_that_is_slow_is_not_chosen() -> None:
    """Whichever stands first."""
    for layouts in (
        [delayed("slow", always), delayed("fast", never)],
        [delayed("fast", never), delayed("slow", always)],
    ):
        runner = runner_of()

        select(runner, *layouts)

        assert {"fast"} == {each.way for each in runner.step_times}
        assert all(each.milliseconds["slow"] > each.milliseconds["fast"] for each in runner.step_times)
        assert isinstance(runner.executor, Delayed)
        assert runner.executor.delays is never


def test_each_step_takes_the_way_that_was_the_fastest_for_its_shape() -> None:
    """With room for two forms of the weights; with one, it is the better of the two for everything."""
    layouts = [delayed("slow decodes", is_decode), delayed("slow prompts", lambda batch: not is_decode(batch))]
    runner, single = runner_of(), runner_of()
    ids = list(range(20))

    select(runner, *layouts, copies=2)
    select(single, *layouts, copies=1)

    assert isinstance(runner.executor, MeasuredExecutor)
    ways: dict[str, Any] = dict(runner.executor.ways)
    for way in ways.values():
        way.sizes.clear()
    runner.forward([Segment(0, 0, ids)], [True])
    runner.forward([Segment(0, 20, [1])], [True])
    runner.forward([Segment(0, 21, [1]), Segment(1, 0, ids)], [True, True])
    assert ([20, 21], [1]) == (ways["slow decodes"].sizes, ways["slow prompts"].sizes)
    assert isinstance(single.executor, Delayed)


def test_steps_are_measured_as_far_as_the_kv_cache_has_room() -> None:
    cache = runner_of(slots=5).cache

    assert [("decode", 1), ("decode", 4), ("prompt", 16), ("prompt", 64)] == shapes_of(cache)


def test_a_measurement_ends_with_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step once; long prompts that would take too long are left out."""
    monkeypatch.setattr(way_timing, "BUDGET_SECONDS", 0)
    monkeypatch.setattr(way_timing, "LARGE_STEP_TOKENS", 16)
    monkeypatch.setattr(way_timing, "MAX_STEP_SECONDS", 1500)
    runner, seen = runner_of(slots=1), list[int]()

    class Counted(TransformersForward):
        def forward(self, batch: PackedBatch) -> Tensor:
            seen.append(batch.size)
            Clock.delays += 40 * batch.size if batch.size in {16, 64} else 0
            return super().forward(batch)

    layouts = [Layout("counted", lambda model, cache: {"counted": Counted(model, cache)}), delayed("other", never)]
    table, _ = WayTimer(runner, layouts, lambda _sample, way: way.install()).measure()

    assert {("decode", 1), ("prompt", 16)} == set(table.seconds["counted"])
    assert {("decode", 1), ("prompt", 16), ("prompt", 64)} == set(table.seconds["other"])
    assert [16, 1] == seen


def test_a_way_that_is_slow_for_every_prompt_is_not_measured_with_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As two shorter ones show; one whose tokens become cheaper is."""
    monkeypatch.setattr(way_timing, "PROMPTS", (8, 16, 64))
    monkeypatch.setattr(way_timing, "LARGE_STEP_TOKENS", 8)
    times = {"fast": (1, 2, 8), "slow": (2, 4, 16), "soon as fast": (2, 2.1, 3)}

    def seconds(_sample: ModelRunner, way: Any, shape: Shape) -> float:
        return 0.001 * (1 if shape.kind == "decode" else times[way.name][(8, 16, 64).index(shape.tokens)])

    class Named(TransformersForward):
        name = ""

    def layout(name: str) -> Layout:
        return Layout(name, lambda model, cache: {name: type(name, (Named,), {"name": name})(model, cache)})

    monkeypatch.setattr(way_timing, "step_seconds", seconds)
    runner = runner_of(slots=1)
    table, _ = WayTimer(runner, [*map(layout, times)], install_without_proof).measure()

    assert {"fast": True, "slow": False, "soon as fast": True} == {
        name: Shape("prompt", 64) in known for name, known in table.seconds.items()
    }
    assert "soon as fast" == table.fastest([*times], Shape("prompt", 64))
    described = {str(each).partition(":")[0]: str(each) for each in table.describe([*times])}
    assert "slow 4 ms" in described["prompt 16"]
    assert "slow" not in described["prompt 64"]


def test_a_disturbed_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of the runs does, and no step takes longer than a larger one."""
    monkeypatch.setattr(way_timing, "BUDGET_SECONDS", 10)
    monkeypatch.setattr(way_timing, "MAX_STEP_SECONDS", 10_000)
    runner, runs = runner_of(slots=4), list[Shape]()

    def disturbed(sample: ModelRunner, way: Any, shape: Shape) -> float:
        runs.append(shape)
        return 900 if runs.count(shape) == 1 or shape == Shape("decode", 1) else float(shape.tokens)

    monkeypatch.setattr(way_timing, "step_seconds", disturbed)
    table, _ = WayTimer(runner, [delayed("way", never)], install_without_proof).measure()

    assert {("decode", 1): 4, ("decode", 4): 4, ("prompt", 16): 16, ("prompt", 64): 64} == table.seconds["way"]


def test_times_of_a_busy_machine_decide_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first way that works is taken, the next load measures again, and nobody is warned: nothing is wrong."""
    waited = itertools.count(step=100)
    monkeypatch.setattr(way_timing, "waited_seconds", lambda: next(waited))
    runner = runner_of()

    with caplog.at_level(logging.INFO):
        select(runner, delayed("slow", always), delayed("fast", never))

    assert isinstance(runner.executor, Delayed)
    assert runner.executor.delays is always
    assert "too busy" in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert ((), []) == (runner.step_times, list(folder.iterdir()))


def test_a_busy_machine_is_noticed_after_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """There they take a hundred times as long, and a load would take minutes."""
    monkeypatch.setattr(way_timing, "MIN_OBSERVED_SECONDS", 12)
    waited = itertools.count(step=5)
    monkeypatch.setattr(way_timing, "waited_seconds", lambda: next(waited))
    runner, ways = runner_of(), list[Delayed]()

    def layout(model: Any, cache: KVCache) -> dict[str, OptionalExecutor]:
        ways.append(Delayed(model, cache, always))
        return {"slow": ways[-1]}

    layouts = [Layout("slow", layout), delayed("other", never)]
    table, _ = WayTimer(runner, layouts, install_without_proof).measure()

    assert {"slow": {}, "other": {}} == table.seconds
    assert 3 == sum(len(way.sizes) for way in ways)


def test_a_thread_that_gets_no_processor_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system counts it, for all threads of the process."""
    monkeypatch.undo()
    processor = {min(os.sched_getaffinity(0))}
    before, done = way_timing.waited_seconds(), threading.Event()

    def spin() -> None:
        os.sched_setaffinity(0, processor)
        while not done.is_set():
            pow(3, 50_000)

    threads = [threading.Thread(target=spin) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    found = way_timing.waited_seconds()
    done.set()
    for thread in threads:
        thread.join()

    assert found > before


def install_without_proof(_sample: ModelRunner, way: Any) -> None:
    way.install()


def test_a_way_that_fails_or_differs_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """With the reason in the log; the others are measured."""

    class Broken(TransformersForward):
        def install(self) -> None:
            raise ExecutorUnavailableError("it is broken")

    class Wrong(TransformersForward):
        def forward(self, batch: PackedBatch) -> Tensor:
            return super().forward(batch) * 1.5

    runner = runner_of()
    before = runner.reference_logits()
    with caplog.at_level(logging.WARNING):
        select(
            runner,
            Layout("broken", lambda model, cache: {"broken": Broken(model, cache)}),
            Layout("wrong", lambda model, cache: {"wrong": Wrong(model, cache)}),
            delayed("right", never),
        )

    assert {"right"} == set(runner.step_times[0].milliseconds)
    assert "not computed by broken: it is broken" in caplog.text
    assert "not computed by wrong: its logits differ by 50.00%" in caplog.text
    assert torch.equal(before, runner.reference_logits())


def test_a_way_that_fails_on_the_whole_model_makes_room_for_the_next(caplog: pytest.LogCaptureFixture) -> None:
    """Some layers prove much and not all."""
    runner = runner_of()

    class Late(TransformersForward):
        def install(self) -> None:
            if self.model is runner.model:
                raise ExecutorUnavailableError("not all of them")

    with caplog.at_level(logging.WARNING):
        select(runner, Layout("late", lambda model, cache: {"late": Late(model, cache)}), delayed("next", always))

    assert isinstance(runner.executor, Delayed)
    assert "not computed by late: not all of them" in caplog.text


def test_the_second_load_of_a_model_measures_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until something is different: its sizes, its type, the threads or the ways."""
    layouts = [delayed("a", never), delayed("b", always)]
    first = runner_of()
    select(first, *layouts)
    measured: list[ModelRunner] = []
    measure = WayTimer.measure

    def counted(self: WayTimer) -> Measurement:
        measured.append(first)
        return measure(self)

    monkeypatch.setattr(WayTimer, "measure", counted)

    again = runner_of()
    select(again, *layouts)
    assert ([], first.step_times) == (measured, again.step_times)
    assert 1 == len(list(folder.iterdir()))
    select(runner_of(slots=2), *layouts)
    select(runner_of(dtype=torch.bfloat16), *layouts)
    select(runner_of("qwen2"), *layouts)
    select(runner_of(), *layouts, delayed("c", never))
    assert 4 == len(measured)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff{",
        b"[]",
        b'{"seconds": {"a": [["decode", 1, -1.0]]}, "failures": {}}',
        b'{"seconds": {"a": [["decode", 1, 1.0]], "b": []}, "failures": {}}',
        b'{"seconds": {}, "failures": {}}',
    ],
)
def test_a_damaged_file_is_measured_anew(content: bytes, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    layouts = [delayed("a", never), delayed("b", always)]
    select(runner_of(), *layouts)
    (file,) = folder.iterdir()
    file.write_bytes(content)

    runner = runner_of()
    with caplog.at_level(logging.WARNING):
        select(runner, *layouts)

    assert "cannot be read, and are measured again" in caplog.text
    assert {"a"} == {each.way for each in runner.step_times}
    assert {"a", "b"} == set(json.loads(file.read_bytes())["seconds"])


def test_a_failure_that_may_pass_is_not_kept(folder: Path) -> None:
    class Unlucky(TransformersForward):
        def install(self) -> None:
            raise OSError("no space left")

    select(runner_of(), Layout("x", lambda model, cache: {"x": Unlucky(model, cache)}), delayed("a", never))

    assert [] == list(folder.iterdir())


def test_a_sample_shares_the_weights_and_changes_nothing() -> None:
    """Of 3 layers one, a third of the logits, and the same weights; replacing a layer of it leaves the model alone."""
    model = make(FAMILIES["llama"])
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits

    sample, scale = sample_model(model, 1)
    whole, _ = sample_model(model, None)
    sample.model.layers[0].mlp = None

    assert (1, 3.0) == (len(sample.model.layers), scale)
    assert VOCABULARY // 3 == sample.get_output_embeddings().out_features
    assert model.get_input_embeddings().weight is sample.get_input_embeddings().weight
    assert all(a is b for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert torch.equal(before, model(input_ids=ids).logits)


def test_a_model_whose_passes_somebody_replaced_is_not_copied(caplog: pytest.LogCaptureFixture) -> None:
    """As accelerate does where weights are not in memory; the first way that works computes it."""
    runner = runner_of()
    layer = runner.model.model.layers[1]
    layer.forward = layer.forward

    with pytest.raises(ValueError, match="LlamaDecoderLayer has been replaced"):
        shared_copy(runner.model)
    with caplog.at_level(logging.WARNING):
        select(runner, delayed("first", never), delayed("second", never))

    assert "cannot be measured" in caplog.text
    assert () == runner.step_times
    assert isinstance(runner.executor, Delayed)


def test_the_parent_process_is_told_the_table() -> None:
    """As it is, in the message that the model is ready."""
    runner = runner_of()
    select(runner, delayed("a", never), delayed("b", always))
    batching = BatchingRunner(loaded(runner.model), runner)

    sent = decode_from_worker(encode(model_ready("folder", loaded(runner.model), batching)))

    assert isinstance(sent, Ready)
    assert runner.step_times == sent.step_times
    assert 5 == len(sent.step_times)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ways_compute_the_same(family: str, dtype: torch.dtype) -> None:
    """Of one step, each beside the model's own layers."""
    runner = runner_of(family, dtype)
    expected = runner.reference_logits()
    names = []
    for layout in cpu_layouts("auto", keep_layers=family != "llama"):
        sample = ModelRunner(shared_copy(runner.model), runner.cache, runner.executor)
        sample.executor = TransformersForward(sample.model, runner.cache)
        for name, way in layout.ways(sample.model, runner.cache).items():
            install_verified(sample, way, 1e-4 if dtype == torch.float32 else 5e-2)
            names.append(name)

    # Native layers have a way for each kernel.
    assert 4 + (len(gemm_kernels().kernels) if family == "llama" else 0) == len(names)
    assert torch.equal(expected, runner.reference_logits())


def two_ways(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> MeasuredExecutor:
    """Let native layers compute decoding steps and torch prompts, as if measured."""
    times = {NATIVE: (0.01, 0.9), TORCH: (0.09, 0.1)}
    seconds = {name: {Shape("decode", 1): one, Shape("prompt", 16): many} for name, (one, many) in times.items()}
    monkeypatch.setattr(WayTimer, "measure", lambda self: Measurement(TimeTable(seconds), {}))
    select(runner, *cpu_layouts("auto", keep_layers=False), copies=2)
    assert isinstance(runner.executor, MeasuredExecutor)
    assert {NATIVE, TORCH} == set(runner.executor.ways)
    return runner.executor


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_forms_of_the_weights_serve_one_kv_cache(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt computed by torch is decoded by the native layers, beside another prompt."""
    runner, plain = runner_of(dtype=dtype), torch_runner(make(FAMILIES["llama"]).to(dtype), slots=8, length=CONTEXT)
    two_ways(runner, monkeypatch)
    ids = [(7 * place) % VOCABULARY for place in range(40)]
    passes = [
        [Segment(0, 0, ids)],
        [Segment(0, 40, [1])],
        [Segment(0, 41, [2]), Segment(3, 0, ids[:20])],
        [Segment(0, 42, [3]), Segment(3, 20, [4])],
    ]

    for segments in passes:
        wanted = [True] * len(segments)
        expected, found = (each.forward(segments, wanted).float() for each in (plain, runner))
        assert (found - expected).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


@pytest.mark.usefixtures("compiler")
def test_adapters_work_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of one sequence have the scores of PEFT's merged model, whichever way computes the step."""
    adapter, merged = adapted(FAMILIES["llama"], tmp_path / "a", r=4)
    runner = runner_of(slots=6)
    executor = two_ways(runner, monkeypatch)

    for row, length, logits in mixed_passes(runner, [adapter, None, adapter, None, None, adapter]):
        if row in {0, 2, 5}:
            expected = scores(merged, [(7 * row + 3 * place + 1) % VOCABULARY for place in range(length)])
            assert (logits - expected).norm() <= 1e-5 * expected.norm()
    executor.forget_adapter(adapter)


def test_the_folder_of_compiled_kernels_keeps_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the service lists for its workers."""
    monkeypatch.undo()
    monkeypatch.setattr(way_timing, "waited_seconds", lambda: 0)
    code = tmp_path / "data" / "compiled"
    monkeypatch.setenv(CODE_FOLDERS, json.dumps([str(code)]))

    select(runner_of(), delayed("a", never), delayed("b", always))

    assert [".json"] == [each.suffix for each in code.iterdir()]
