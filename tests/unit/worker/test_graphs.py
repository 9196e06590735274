"""Decoding in recorded passes: the logits of torch's way, whatever is in a batch.

Without a GPU a recorded pass is one that is called; it reads and writes the same tensors as a captured one.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.ipc.messages import TokenEvent
from app.worker.execution import executor_selection
from app.worker.execution.base import ExecutorUnavailableError
from app.worker.execution.executor_selection import install_verified, select_executor
from app.worker.execution.graphs.cuda_graphs import CudaGraphs
from app.worker.execution.graphs.graph_executor import GraphExecutor, Pass
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import Segment
from app.worker.execution.torch.equivalence import torch_runner
from app.worker.sampling.device_sampler import DeviceSampler
from app.worker.scheduling import trial_step
from app.worker.scheduling.batching_runner import BatchingRunner
from app.worker.scheduling.trial_step import compute_largest_step
from tests.unit.worker.families import CONTEXT, FAMILIES, VOCABULARY, loaded, make
from tests.unit.worker.lora_adapters import read, save_adapter
from tests.unit.worker.test_batching_runner import PROMPTS, completion_of, generate, run, submit

SLOTS = 5
IDS = [[(7 * row + 3 * place + 1) % VOCABULARY for place in range(CONTEXT)] for row in range(SLOTS)]


def called(compute: Pass) -> Pass:
    """What a pass is where nothing is captured."""
    return compute


def with_graphs(runner: ModelRunner, record: Callable[[Pass], Pass] = called, *, pass_keys: int = 0) -> ModelRunner:
    def verify(found: Tensor, expected: Tensor) -> None:
        runner.verify_logits(found, expected, 1e-4)

    executor = GraphExecutor(runner.executor, runner.cache, record, verify, pass_keys=pass_keys, min_keys=16)
    install_verified(runner, executor, 1e-4)
    return runner


def runners(family: str, **settings: Any) -> tuple[ModelRunner, ModelRunner]:
    """One model by torch's way, and by recorded passes."""
    one, other = (torch_runner(make(FAMILIES[family]), slots=SLOTS, length=CONTEXT) for _ in range(2))
    for runner in (one, other):
        runner.reference_logits()
    return one, with_graphs(other, **settings)


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= 1e-4 * expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_are_those_of_generate(family: str) -> None:
    """Requests that come one after the other, so that every step holds another number of rows, and prompts beside."""
    model = make(FAMILIES[family])
    expected = [generate(model, prompt) for prompt in PROMPTS]
    model_runner = with_graphs(torch_runner(model, slots=3, length=CONTEXT))
    runner, events = BatchingRunner(loaded(model), model_runner), list[TokenEvent]()

    for number, prompt in enumerate(PROMPTS):
        submit(runner, prompt, number)
        runner.step(events.extend)
        runner.step(events.extend)
    events += run(runner)

    assert "graphs" == runner.compiled
    assert expected == [completion_of(events, number) for number in range(len(PROMPTS))]


@pytest.mark.parametrize("pass_keys", [0, 10**9], ids=["passes apart", "one pass"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_logits_come_in_the_order_of_the_batch(family: str, pass_keys: int, tmp_path: Path) -> None:
    """Tokens of short and long sequences, some without logits; adapters, guesses and prompts between them."""
    torch_way, graphs = runners(family, pass_keys=pass_keys)
    adapter = read(save_adapter(make(FAMILIES[family]), tmp_path), make(FAMILIES[family]))
    lengths = [40, 3, 20, 9, 30]
    decodes = [Segment(row, end, IDS[row][end : end + 1]) for row, end in enumerate(lengths)]
    adapted = Segment(2, 20, IDS[2][20:21], adapter)
    guesses, prompt = Segment(3, 9, IDS[3][9:13]), Segment(4, 0, IDS[4][:7])
    batches: list[tuple[list[Segment], list[int]]] = [
        (decodes, [1, 1, 1, 1, 1]),
        (decodes[1:4], [1, 0, 1]),
        ([decodes[0], decodes[1], adapted, guesses, prompt], [1, 1, 1, 4, 1]),
        ([decodes[0], adapted, prompt], [0, 1, 3]),
        ([adapted, decodes[4]], [1, 1]),
        ([guesses], [2]),
    ]
    for runner in (torch_way, graphs):
        runner.forward([Segment(row, 0, IDS[row][:end]) for row, end in enumerate(lengths)], [0] * SLOTS)

    for segments, wanted in batches:
        assert close(graphs.forward(segments, wanted), torch_way.forward(segments, wanted))


def test_a_result_stays_when_the_next_pass_is_computed() -> None:
    """Recorded passes write their logits to one memory."""
    _, graphs = runners("llama")
    first = graphs.forward([Segment(0, 0, [5])], [1])
    before = first.clone()

    graphs.forward([Segment(0, 1, [6]), Segment(1, 0, [7])], [1, 1])

    assert torch.equal(before, first)


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("pass_keys", [0, 10**9], ids=["passes apart", "one pass"])
def test_the_next_token_of_each_row_needs_no_layout(rows: int, pass_keys: int) -> None:
    """Until one of them needs more keys than its pass reads: then the step has to be laid out."""
    torch_way, graphs = runners("llama", pass_keys=pass_keys)
    lengths = [12, 5, 3, 9, 7][:rows]
    for runner in (torch_way, graphs):
        runner.forward([Segment(row, 0, IDS[row][:end]) for row, end in enumerate(lengths)], [0] * rows)
    continued = list[bool]()
    for step in range(10):
        segments = [Segment(row, end + step, IDS[row][end + step : end + step + 1]) for row, end in enumerate(lengths)]
        # A token more than there are rows: only the first ones are read.
        found = graphs.forward_next(torch.tensor([*(each.token_ids[0] for each in segments), 99]))
        continued.append(found is not None)
        if found is None:
            found = graphs.forward(segments, [1] * rows)
        assert close(found, torch_way.forward(segments, [1] * rows))

    # With 16 keys to a pass, the first row's fifth token is the first that needs more.
    assert [False, True, True, True, False] == continued[:5]
    if rows == 1 or pass_keys:
        assert all(continued[5 : 7 if rows > 3 else 10])


def test_what_was_not_one_pass_of_all_rows_has_to_be_laid_out() -> None:
    """After a prompt, after tokens without logits, after passes apart, and where there are no passes."""
    torch_way, graphs = runners("llama")
    decodes, tokens = [Segment(row, 20 + row, [row]) for row in range(2)], torch.tensor([1, 2])
    batches = [
        ([decodes[0], Segment(1, 0, [5, 6])], [1, 1]),
        (decodes, [1, 0]),
        ([decodes[0], Segment(1, 60, [5])], [1, 1]),
    ]

    for segments, wanted in batches:
        graphs.forward(segments, wanted)
        assert graphs.forward_next(tokens) is None
    torch_way.forward(decodes, [1, 1])
    assert torch_way.forward_next(tokens) is None
    graphs.forward(decodes, [1, 1])
    assert graphs.forward_next(tokens) is not None


@pytest.mark.parametrize(("pass_keys", "passes"), [(0, 2), (10**9, 1)])
def test_short_sequences_do_not_read_as_many_keys_as_a_long_one(pass_keys: int, passes: int) -> None:
    """They have a pass of their own, unless a second pass takes longer than those keys."""
    computed: list[Pass] = []

    def record(compute: Pass) -> Pass:
        def counted() -> None:
            computed.append(compute)
            compute()

        return counted

    _, graphs = runners("llama", record=record, pass_keys=pass_keys)
    computed.clear()

    graphs.forward([Segment(row, 60 if row == 3 else 2, [row]) for row in range(SLOTS)], [1] * SLOTS)

    assert passes == len(computed)


def test_nan_of_one_slot_stays_there() -> None:
    """Also where all slots are read at once."""
    _, graphs = runners("llama")
    decodes = [Segment(row, 4, [row]) for row in range(SLOTS)]
    before = graphs.forward(decodes, [1] * SLOTS)
    with torch.inference_mode():
        for layer in range(3):
            graphs.cache.layer(layer)[0][2, :, 0] = float("nan")

    found = graphs.forward(decodes, [1] * SLOTS)

    others = [0, 1, 3, 4]
    assert torch.equal(before[others], found[others])
    assert bool(found[2].isnan().all())
    assert close(graphs.forward(decodes[:1], [1]), before[:1])


@pytest.mark.parametrize("lenient", [False, True])
def test_passes_that_compute_something_else_are_not_used(lenient: bool) -> None:
    """All are tried at load; the model is left to the other executor, and what they wrote is gone."""
    runner = torch_runner(make(FAMILIES["llama"]), slots=SLOTS, length=CONTEXT)
    before = runner.reference_logits()

    def record(compute: Pass) -> Pass:
        """The pass of one number of rows writes NaN to all slots."""
        number = len(recorded)
        recorded.append(compute)

        def spoil() -> None:
            compute()
            if number == 4:
                for layer in range(3):
                    runner.cache.layer(layer)[0].fill_(float("nan"))
                compute()

        return spoil

    recorded: list[Pass] = []
    executor = GraphExecutor(
        runner.executor,
        runner.cache,
        record,
        lambda found, expected: None if lenient else runner.verify_logits(found, expected, 1e-4),
        min_keys=16,
    )
    with pytest.raises(ExecutorUnavailableError, match=r"logits .*differ"):
        install_verified(runner, executor, 1e-4)

    assert runner.compiled is None
    assert torch.equal(before, runner.reference_logits())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_without_cuda_graphs_decoding_is_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    """For instance because the driver is too old: it is logged, and the model serves."""
    runner = torch_runner(make(FAMILIES["llama"]), slots=2, length=CONTEXT)
    before = runner.reference_logits()
    runner.model.__class__ = type("OnGpu", (type(runner.model),), {"device": torch.device("cuda")})

    with caplog.at_level(logging.WARNING, executor_selection.__name__):
        select_executor(runner, "auto")

    assert "decoding is left to torch: " in caplog.text
    assert runner.compiled is None
    assert torch.equal(before, runner.reference_logits())


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    """A runner whose model says that it is on a GPU, where whatever is asked of the driver goes well."""
    for name in ("graph_pool_handle", "Stream", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    runner = torch_runner(make(FAMILIES["llama"]), slots=SLOTS, length=CONTEXT)
    runner.model.__class__ = type("OnGpu", (type(runner.model),), {"device": torch.device("cuda")})
    return runner


def test_a_pass_that_cannot_be_captured_leaves_decoding_to_torch(
    on_a_gpu: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As long as the device answers: a forbidden call ends the capture, and nothing else."""

    def refuse(self: CudaGraphs, compute: Pass) -> None:
        raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")

    before = on_a_gpu.reference_logits()
    monkeypatch.setattr(CudaGraphs, "_capture", refuse)

    with caplog.at_level(logging.WARNING, executor_selection.__name__):
        select_executor(on_a_gpu, "auto")

    assert (
        "decoding is left to torch: a pass cannot be captured: AcceleratorError: CUDA error: operation" in caplog.text
    )
    assert torch.equal(before, on_a_gpu.reference_logits())


@pytest.mark.parametrize(("most", "slots"), [(SLOTS, SLOTS), (3, 3), (1, 1)])
@pytest.mark.parametrize("scarce", ["graphs", "the largest step"])
def test_there_are_as_many_slots_as_leave_memory(
    scarce: str, most: int, slots: int, on_a_gpu: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the graphs, and with them in memory for the largest step; what is then decoded is right."""

    def capture(self: CudaGraphs, compute: Pass) -> Any:
        if scarce == "graphs" and on_a_gpu.cache.slots > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return type("Graph", (), {"replay": staticmethod(compute)})

    def largest_step(runner: ModelRunner) -> None:
        if scarce == "the largest step" and runner.cache.slots > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        compute_largest_step(runner, 20)

    monkeypatch.setattr(CudaGraphs, "_capture", capture)
    select_executor(on_a_gpu, "auto", largest_step=largest_step)

    assert slots == on_a_gpu.cache.slots == len(on_a_gpu.cache.layer(0)[0])
    assert "graphs" == on_a_gpu.compiled
    on_a_gpu.model.__class__ = type(on_a_gpu.model).__mro__[1]
    runner = BatchingRunner(loaded(on_a_gpu.model), on_a_gpu)
    for number, prompt in enumerate(PROMPTS):
        submit(runner, prompt, number)
    events = run(runner)
    expected = [generate(on_a_gpu.model, prompt) for prompt in PROMPTS]
    assert expected == [completion_of(events, number) for number in range(len(PROMPTS))]


@pytest.mark.parametrize("fault", [None, "capture"])
def test_sampling_is_captured_beside_the_passes(
    fault: str | None, on_a_gpu: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be is launched as it was, and said; either way what is sampled is right."""
    replayed, samplers = list[Pass](), list[DeviceSampler]()

    def capture(self: CudaGraphs, compute: Pass) -> Any:
        sampling = "SamplingGraphs" in compute.__qualname__
        if sampling and fault is not None:
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")

        def replay() -> None:
            if sampling:
                replayed.append(compute)
            compute()

        return type("Graph", (), {"replay": staticmethod(replay)})

    monkeypatch.setattr(CudaGraphs, "_capture", capture)
    with caplog.at_level(logging.WARNING, trial_step.__name__):
        select_executor(on_a_gpu, "auto", largest_step=lambda runner: samplers.append(compute_largest_step(runner, 20)))
    on_a_gpu.model.__class__ = type(on_a_gpu.model).__mro__[1]
    replayed.clear()
    runner = BatchingRunner(loaded(on_a_gpu.model), on_a_gpu, asynchronous=True, device_sampler=samplers[0])
    submit(runner, PROMPTS[2], max_tokens=6)
    events = run(runner)

    assert "graphs" == on_a_gpu.compiled
    assert generate(on_a_gpu.model, PROMPTS[2])[:6] == completion_of(events, 1)
    assert (0 if fault else 6) == len(replayed)
    assert bool(fault) == ("the kernels of sampling are launched one by one" in caplog.text)


def test_where_one_slot_is_too_many_prompts_are_computed_in_pieces(
    on_a_gpu: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and the model serves."""

    def refuse(self: CudaGraphs, compute: Pass) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CudaGraphs, "_capture", refuse)
    with caplog.at_level(logging.WARNING, executor_selection.__name__):
        select_executor(on_a_gpu, "auto")

    assert (1, None) == (on_a_gpu.cache.slots, on_a_gpu.compiled)
    assert "memory has no room for graphs" in caplog.text
    assert bool(on_a_gpu.reference_logits().isfinite().all())


def test_a_device_that_is_lost_while_capturing_ends_the_load(
    on_a_gpu: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*args: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(CudaGraphs, "_capture", lose)
    monkeypatch.setattr(torch.cuda, "synchronize", lose)

    with pytest.raises(torch.AcceleratorError):
        select_executor(on_a_gpu, "auto")


def test_none_records_nothing(on_a_gpu: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_selection, "CudaGraphs", None)

    select_executor(on_a_gpu, "none")

    assert on_a_gpu.compiled is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
def test_captured_passes_compute_what_torch_does() -> None:
    model = make(FAMILIES["llama"]).to("cuda")
    runner = torch_runner(model, slots=SLOTS, length=CONTEXT)
    decodes = [Segment(row, 0, [row + 1]) for row in range(SLOTS)]
    expected = runner.forward(decodes, [1] * SLOTS)

    with_graphs(runner, CudaGraphs().record)

    assert "graphs" == runner.compiled
    assert close(runner.forward(decodes, [1] * SLOTS), expected)
