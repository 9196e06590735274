"""Layers compiled by torch: the logits of the layers as they were, from few graphs; and the setting for that."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from app.ipc.messages import ModelSpec
from app.worker import process
from app.worker.execution.base import ExecutorUnavailableError, UnsupportedModelError
from app.worker.execution.compiled.torch_compile import TorchCompileExecutor
from app.worker.execution.executor_selection import install_verified
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.native import native_build
from app.worker.execution.packed_batch import Segment
from app.worker.execution.torch.equivalence import torch_runner
from app.worker.loading.loader import load
from app.worker.loading.model_files import LoadError
from app.worker.process import Runner, make_runner
from app.worker.scheduling.batching_runner import BatchingRunner
from tests.unit.tiny_models import save_tiny_llama
from tests.unit.worker.families import CONTEXT, FAMILIES, VOCABULARY, loaded, make
from tests.unit.worker.test_batching_runner import PROMPTS, complete, completion_of, generate, run, submit
from tests.unit.worker.test_graphs import with_graphs

TRACED = "eager"
"""torch traces the layers into graphs, but generates no machine code: many seconds less for each test."""


@pytest.fixture(autouse=True)
def forget_graphs() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_layers(runner: ModelRunner, backend: Any = "inductor") -> ModelRunner:
    """Install compiled layers in a runner, verified as they are at load."""
    executor = TorchCompileExecutor(runner.executor, runner.model, runner.cache, backend=backend)
    install_verified(runner, executor, tolerance=1e-3)
    return runner


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_layers_complete_as_generate_does() -> None:
    """By the compiler that is used for real, alone and in company."""
    model = make(FAMILIES["llama"])
    expected = [generate(model, prompt) for prompt in PROMPTS]
    compiled = compile_layers(torch_runner(model, slots=3, length=CONTEXT))

    assert "layers" == compiled.compiled
    runner = BatchingRunner(loaded(model), compiled)
    assert expected[1] == complete(runner, PROMPTS[1])
    for number, prompt in enumerate(PROMPTS):
        submit(runner, prompt, number)
    events = run(runner)
    assert expected == [completion_of(events, number) for number in range(len(PROMPTS))]


@pytest.mark.parametrize(("family", "graphs"), [("gpt2", 2), pytest.param("gemma2", 4, marks=pytest.mark.soak)])
def test_a_model_is_a_few_graphs_however_many_layers_it_has(family: str, graphs: int) -> None:
    """One for a single token and one for any number, for each kind of layer; none of them broken in two."""
    model = make(FAMILIES[family])
    runner, ids = torch_runner(model, slots=2, length=CONTEXT), [3 * place % VOCABULARY for place in range(CONTEXT)]
    mixed = [Segment(0, 10, ids[10:11]), Segment(1, 0, ids[:20])]
    passes = [[Segment(0, 0, ids[:9])], [Segment(0, 9, ids[9:10])], mixed]
    expected = [runner.forward(segments, [True] * len(segments)) for segments in passes]

    compile_layers(runner, backend=TRACED)

    found = [runner.forward(segments, [True] * len(segments)) for segments in passes]
    assert all((one - other).norm() <= 1e-4 * other.norm() for one, other in zip(found, expected, strict=True))
    assert (graphs, {}) == (counters["stats"]["unique_graphs"], dict(counters["graph_break"]))


@pytest.mark.soak
def test_decoding_through_compiled_layers_can_be_recorded() -> None:
    """The operator that attends calls whichever backend a pass has."""
    model = make(FAMILIES["llama"])
    expected = [generate(model, prompt) for prompt in PROMPTS]
    recorded = with_graphs(compile_layers(torch_runner(model, slots=3, length=CONTEXT), TRACED))
    runner = BatchingRunner(loaded(model), recorded)

    for number, prompt in enumerate(PROMPTS):
        submit(runner, prompt, number)
    events = run(runner)

    assert "layers" == runner.compiled
    assert expected == [completion_of(events, number) for number in range(len(PROMPTS))]


@pytest.mark.soak
def test_two_models_use_their_own_kv_caches() -> None:
    one, other = (torch_runner(make(FAMILIES["llama"]), slots=2, length=CONTEXT) for _ in range(2))
    compile_layers(one, backend=TRACED)
    expected = one.forward([Segment(0, 0, [1, 2, 3])], [True])

    compile_layers(other, backend=TRACED)
    other.forward([Segment(0, 0, [9, 8, 7])], [True])

    assert torch.allclose(expected, one.forward([Segment(0, 2, [3])], [True]), rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_compiled_are_left_as_they_were() -> None:
    """A compiler that fails, one that computes something else, and a model that does not say what its layers are."""

    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no")

    def lies(graph: Any, inputs: Any) -> Any:
        return lambda *values: tuple(
            each * 2 if isinstance(each, torch.Tensor) else each for each in graph.forward(*values)
        )

    model = make(FAMILIES["llama"])
    runner = torch_runner(model, slots=2, length=CONTEXT)
    segments = [Segment(0, 0, [1, 2, 3])]
    expected = runner.forward(segments, [True])

    for backend, error in ((fails, BackendCompilerFailed), (lies, ExecutorUnavailableError)):
        torch._dynamo.reset()
        with pytest.raises(error):
            compile_layers(runner, backend=backend)
        assert torch.equal(expected, runner.forward(segments, [True]))
        assert runner.compiled is None

    model._no_split_modules = None
    with pytest.raises(ExecutorUnavailableError, match="nothing says which modules"):
        compile_layers(runner)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def runner_of(folder: Path, setting: Any, *, engine: Any = "auto", device: str = "cpu") -> Runner:
    """Args: device: what the model is said to be on."""
    spec = ModelSpec(
        name=str(folder),
        source="local",
        device="cpu",
        dtype="auto",
        compile=setting,
        engine=engine,
        revision=None,
        max_model_len=None,
        threads=1,
    )
    model = load(spec, str(folder / "saved"), on_stage=lambda stage: None)
    return make_runner(replace(model, device=device), spec)


@pytest.mark.usefixtures("compiler")
def test_the_setting_decides_what_is_compiled(folder: Path) -> None:
    """And `/status` says it."""
    for setting, compiled in (("auto", "layers"), ("layers", "layers"), ("none", None)):
        assert compiled == runner_of(folder, setting).compiled


def test_layers_are_not_left_uncompiled_in_silence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are installed or the load fails: the serial runner compiles none, chosen or fallen back to."""

    def refuse(*model: Any, **sizes: Any) -> ModelRunner:
        raise UnsupportedModelError("it is strange")

    monkeypatch.setattr(process, "kv_cache_bytes", lambda device, *, step_bytes: 10**9)
    monkeypatch.setattr(process, "create_torch_runner", refuse)

    with pytest.raises(LoadError, match="layers needs batching"):
        runner_of(folder, "layers", engine="serial", device="cuda")
    with pytest.raises(LoadError, match="it cannot be batched: it is strange"):
        runner_of(folder, "layers", device="cuda")
    assert "serial" == runner_of(folder, "auto", device="cuda").name


def test_without_a_compiler_layers_are_refused_and_else_left_to_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "COMPILERS", ())
    monkeypatch.delenv("CXX", raising=False)

    assert runner_of(folder, "auto").compiled is None
    with pytest.raises(LoadError, match=r"its layers cannot be compiled: .*no C\+\+ compiler"):
        runner_of(folder, "layers")
