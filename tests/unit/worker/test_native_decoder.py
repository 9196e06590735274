"""The native decoder: the logits of torch's layers for every supported model, and torch where they differ."""

import copy
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from app.ipc.messages import Compile
from app.worker.execution import executor_selection
from app.worker.execution.base import ExecutorUnavailableError
from app.worker.execution.executor_selection import cpu_layouts, select_executor
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.native import native_build
from app.worker.execution.native.native_build import CompileError
from app.worker.execution.native.native_executors import NativeDecoderExecutor
from app.worker.execution.native.packed_linear import GemmKernel, gemm_kernels
from app.worker.execution.packed_batch import Segment
from app.worker.execution.quantization import quantize_linears, round_to_int8
from app.worker.execution.torch.equivalence import torch_runner
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.execution.ways import MeasuredExecutor
from tests.unit.worker.families import CONTEXT, FAMILIES, VOCABULARY, make

pytestmark = pytest.mark.usefixtures("compiler")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": CONTEXT // 4}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": FAMILIES["llama"],
    "biases": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "tied scores": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "stretched positions": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rope_parameters=YARN)),
    "one KV head": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "num_key_value_heads": 1})),
    "windows": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=8)),
    "windows in some layers": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    ),
    "norms of heads": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES)),
}


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.soak)], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def source_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources to be changed, which the kernel libraries are built from instead."""
    monkeypatch.setattr(native_build, "SOURCE_DIR", shutil.copytree(native_build.SOURCE_DIR, tmp_path / "native"))
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-O0"))  # compiled in half of the time
    return tmp_path / "native"


@pytest.fixture
def emulated_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with tiles, which this one may not be."""
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-O1", "-DLLMK_EMULATE_TILES=1"))


def change(source: Path, right: str, wrong: str) -> None:
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))


def accelerated(model: Any, setting: Compile = "layers", slots: int = 4) -> ModelRunner:
    runner = create_torch_runner(model, length=CONTEXT, slots=slots, free_bytes=10**9)
    select_executor(runner, setting)
    return runner


def weight_types(runner: ModelRunner) -> list[torch.dtype]:
    # Where the processor has tiles, there may be two of one layout.
    ways = runner.executor.ways.values() if isinstance(runner.executor, MeasuredExecutor) else [runner.executor]
    types = [way.weight_types for way in ways if isinstance(way, NativeDecoderExecutor)]
    assert types
    return types[0]


def halved(model: Any) -> Any:
    """Its weights rounded to bfloat16, as in most checkpoints, so that they are packed in 16 bits."""
    return model.to(torch.bfloat16).float()


def quantized(model: Any) -> Any:
    quantize_linears(model, torch.tensor([[5, 6, 7, 8]]), round_to_int8)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("threads")
def test_compiled_layers_score_as_torch_does(kind: str) -> None:
    """Pieces of prompts beside single tokens, some of which no scores are wanted of, rows with gaps between them."""
    runner, plain = (
        accelerated(halved(make(KINDS[kind]))),
        torch_runner(halved(make(KINDS[kind])), slots=4, length=CONTEXT),
    )
    ids = [[(7 * row + 3 * place) % VOCABULARY for place in range(CONTEXT)] for row in range(4)]
    passes = [
        ([Segment(0, 0, ids[0][:9]), Segment(2, 0, ids[2][:30])], [False, True]),
        ([Segment(0, 9, ids[0][9:10]), Segment(2, 30, ids[2][30:31]), Segment(3, 0, ids[3][:5])], [True, True, False]),
        ([Segment(1, 0, ids[1][:40])], [False]),
        ([Segment(0, 10, ids[0][10:11]), Segment(3, 5, ids[3][5:6]), Segment(2, 31, ids[2][31:60])], [True] * 3),
        ([Segment(1, 40, ids[1][40:41])], [True]),
    ]

    assert "layers" == runner.compiled
    for segments, wanted in passes:
        expected = plain.forward(segments, wanted)
        found = runner.forward(segments, wanted)
        assert expected.shape == found.shape
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("threads")
def test_in_bfloat16_scores_are_nearer_to_exact_ones_than_torchs(kind: str) -> None:
    """What goes from layer to layer is not rounded, and keys, values and the factors of products are."""
    runner, exact = (
        accelerated(make(KINDS[kind]).bfloat16()),
        torch_runner(halved(make(KINDS[kind])), slots=4, length=CONTEXT),
    )
    torchs = torch_runner(make(KINDS[kind]).bfloat16(), slots=4, length=CONTEXT)
    ids = [(3 * place) % VOCABULARY for place in range(CONTEXT)]

    assert "layers" == runner.compiled
    for segments in (
        [Segment(2, 0, ids[:50])],
        [Segment(0, 0, ids[:1]), Segment(2, 50, ids[50:60])],
        [Segment(2, 60, [1])],
    ):
        wanted = [True] * len(segments)
        expected = exact.forward(segments, wanted)
        ours, theirs = (each.forward(segments, wanted).float() - expected for each in (runner, torchs))
        assert ours.norm() <= theirs.norm()
        assert ours.norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "windows", "norms of heads"])
@pytest.mark.usefixtures("threads")
def test_in_bfloat16_scores_do_not_depend_on_company(kind: str) -> None:
    """Bit for bit: rounding to 16 bits makes a difference of order one that is seen, and a seed's answer another."""
    runner = accelerated(make(KINDS[kind]).bfloat16())
    ids = [(7 * place) % VOCABULARY for place in range(50)]
    expected = runner.forward([Segment(0, 0, ids)], [True])

    runner.forward([Segment(1, 0, ids[:20]), Segment(2, 0, ids[::-1])], [False, True])
    runner.forward([Segment(1, 20, ids[20:49])], [False])
    again = runner.forward([Segment(1, 49, ids[49:]), Segment(2, 50, [5]), Segment(3, 0, ids[:13])], [True] * 3)

    assert torch.equal(expected[0], again[0])


@pytest.mark.parametrize("window", [None, 200])
def test_long_chunks_compute_the_logits_of_torch(window: int | None) -> None:
    """More tokens than one block of the GEMM, beside another slot's, and key blocks that not all of them attend to."""
    long = {**SIZES, "max_position_embeddings": 512}

    def build() -> Any:
        return hf.MistralForCausalLM(hf.MistralConfig(**long, sliding_window=window))

    runner = create_torch_runner(make(build), length=512, slots=2, free_bytes=10**9)
    select_executor(runner, "layers")
    plain = torch_runner(make(build), slots=2, length=512)
    ids = [(7 * place) % VOCABULARY for place in range(512)]

    for segments in ([Segment(0, 0, ids[:300])], [Segment(1, 0, ids[:1]), Segment(0, 300, ids[300:490])]):
        wanted = [True] * len(segments)
        expected = plain.forward(segments, wanted)
        assert (runner.forward(segments, wanted) - expected).norm() <= 1e-5 * expected.norm()


def test_weights_of_32_bits_keep_them_all() -> None:
    """Those of a model that was trained in float32 do not fit 16."""
    runner, plain = accelerated(make(KINDS["llama"])), torch_runner(make(KINDS["llama"]), slots=4, length=CONTEXT)
    segments = [Segment(0, 0, [5, 6, 7, 8])]

    expected = plain.forward(segments, [True])

    assert (runner.forward(segments, [True]) - expected).norm() <= 1e-5 * expected.norm()
    assert {torch.float32} == set(weight_types(runner))


@pytest.mark.parametrize("kind", ["llama", "biases"])
def test_int8_weights_compute_the_logits_of_the_same_weights_in_torch(kind: str) -> None:
    """With an output projection of another type, with and without biases."""
    model = quantized(make(KINDS[kind]))
    plain = torch_runner(copy.deepcopy(model), slots=4, length=CONTEXT)
    runner = accelerated(model)
    segments = [Segment(0, 0, [5]), Segment(1, 0, [(7 * place) % VOCABULARY for place in range(40)])]

    expected = plain.forward(segments, [True, True])

    assert (runner.forward(segments, [True, True]) - expected).norm() <= 1e-5 * expected.norm()
    types = weight_types(runner)
    assert ({torch.int8}, torch.float32) == (set(types[:-1]), types[-1])


def test_a_number_that_is_none_stays_in_its_row() -> None:
    runner = accelerated(make(KINDS["llama"]))
    runner.forward([Segment(0, 0, [1, 2, 3]), Segment(1, 0, [1, 2, 3])], [True, True])
    with torch.inference_mode():
        runner.cache.layer(1)[0][0, 0, 1, 0] = float("nan")

    found = runner.forward([Segment(0, 3, [4]), Segment(1, 3, [4])], [True, True])

    assert [False, True] == [bool(each.isfinite().all()) for each in found]


STRANGE: list[tuple[Callable[[], Any], str]] = [
    (FAMILIES["phi"], "phi has layers of another kind"),
    (lambda: make(FAMILIES["llama"]).to(torch.float16), "there are none in float16 with silu"),
    (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, hidden_act="gelu")),
        "there are none in float32 with gelu",
    ),
    (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "hidden_size": 72, "head_dim": 12})),
        "heads of 12 numbers",
    ),
    (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "intermediate_size": 88})),
        "sizes of 96 and 88 do not fill vectors",
    ),
]


@pytest.mark.parametrize(("model", "reason"), STRANGE, ids=[reason for _, reason in STRANGE])
def test_other_layers_are_left_to_torch(
    model: Callable[[], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the reason in the log; who asked for compiled layers is told it instead."""
    with caplog.at_level(logging.WARNING, executor_selection.__name__):
        runner = accelerated(model().eval(), "auto")

    assert runner.compiled != "layers"
    assert re.search(f"not computed by native layers.*: {reason}", caplog.text)
    assert runner.reference_logits().isfinite().all()
    with pytest.raises(CompileError, match=reason):
        accelerated(model().eval(), "layers")


@pytest.mark.parametrize(
    ("source", "right", "wrong", "dtype"),
    [
        ("llama_forward.cpp", "* factor *", "*", torch.float32),
        ("attention_decode.h", "scale * load(q + at)", "load(q + at)", torch.bfloat16),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (
                ("llama_forward.cpp", "first * cos[left] -", "0.0f / 0.0f -", torch.float32),
                ("llama_forward.cpp", "linear<true>(x", "linear<false>(x", torch.float32),
                ("llama_forward.cpp", "silu(load(gate)) * load", "load(gate) * load", torch.float32),
                ("gemm_packed.h", "right * factor;", "right;", torch.float32),
                ("bf16.h", "pairs[panel], factor);", "pairs[panel], factor << 16);", torch.bfloat16),
            )
        ),
    ],
)
def test_a_wrong_kernel_is_not_used(source: str, right: str, wrong: str, dtype: torch.dtype, source_dir: Path) -> None:
    """A compiler may be wrong about the machine; the logits are compared at load, and a model whose logits differ is
    served by torch, whatever the kernel wrote to the KV cache."""
    change(source_dir / source, right, wrong)
    expected = torch_runner(make(KINDS["llama"]).to(dtype), slots=4, length=CONTEXT).reference_logits()

    runner = accelerated(make(KINDS["llama"]).to(dtype), "auto")

    assert runner.compiled != "layers"
    assert (runner.reference_logits() - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


WEIGHTS: dict[str, tuple[Callable[[Any], Any], torch.dtype, float]] = {
    "bfloat16": (lambda model: model.to(torch.bfloat16), torch.bfloat16, 2e-2),
    "int8": (quantized, torch.int8, 2e-6),
    "float16": (halved, torch.float16, 2e-6),
    "float32": (lambda model: model, torch.float32, 2e-6),
}
"""Types of packed weights: a model gets them, and how far tiles may be from panels, as a share of the logits' norm."""


def weighted(kind: str, weights: str) -> Any:
    return WEIGHTS[weights][0](make(KINDS[kind]))


def with_kernel(model: Any, kernel: GemmKernel) -> ModelRunner:
    runner = create_torch_runner(model, length=CONTEXT, slots=4, free_bytes=10**9)
    executor = NativeDecoderExecutor(model, runner.cache, kernel=kernel)
    executor_selection.install_verified(runner, executor, executor_selection.TOLERANCE[model.dtype])
    return runner


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.usefixtures("emulated_tiles")
def test_tiles_compute_what_panels_do_but_for_rounding(weights: str) -> None:
    """Also where inputs and outputs fill no tile, as 112 and 97 do not: in float32 to float32's own rounding, for
    activations are split without loss."""
    segments = [Segment(0, 0, list(range(40))), Segment(1, 0, list(range(7)))]
    (panels, expected), (tiles, found) = (
        (runner, runner.forward(segments, [40, 7]))
        for runner in (with_kernel(weighted("biases", weights), kernel) for kernel in ("panels", "tiles"))
    )

    assert {WEIGHTS[weights][1]} == set(weight_types(panels)[:-1]) == set(weight_types(tiles)[:-1])
    assert not torch.equal(expected, found)
    assert (found - expected).norm() <= WEIGHTS[weights][2] * expected.norm()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.usefixtures("emulated_tiles")
def test_in_tiles_a_token_has_the_same_bits_in_any_batch(weights: str) -> None:
    runner, ids = with_kernel(weighted("llama", weights), "tiles"), list(range(3, 40))
    whole = runner.forward([Segment(0, 0, ids)], [len(ids)])

    for at, token in enumerate(ids):
        single, last = runner.forward([Segment(1, at, [token]), Segment(2, 0, ids[: at + 1])], [1, 1])
        assert torch.equal(whole[at], single)
        assert torch.equal(whole[at], last)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.usefixtures("emulated_tiles")
def test_tiles_are_offered_for_every_type_of_weights(weights: str) -> None:
    model = weighted("llama", weights)
    runner = create_torch_runner(model, length=CONTEXT, slots=4, free_bytes=10**9)

    ways = {
        name: way
        for layout in cpu_layouts("layers", keep_layers=False)
        for name, way in layout.ways(model, runner.cache).items()
    }

    executor_selection.install_verified(runner, ways["native layers, tiles"], executor_selection.TOLERANCE[model.dtype])
    assert "layers" == runner.compiled


@pytest.mark.usefixtures("emulated_tiles")
def test_tiles_that_compute_something_else_are_not_used(source_dir: Path) -> None:
    change(source_dir / "amx_tiles.h", "sum += even + odd", "sum += even")

    assert gemm_kernels().kernels == ("panels",)
    with pytest.raises(CompileError, match="no tiles"):
        with_kernel(weighted("llama", "bfloat16"), "tiles")


@pytest.mark.parametrize(
    ("right", "wrong"), [("low >> 16 | high", "low >> 16"), ("SPLIT_TERMS = 3", "SPLIT_TERMS = 1")]
)
@pytest.mark.usefixtures("emulated_tiles")
def test_split_activations_that_lose_something_are_not_used(right: str, wrong: str, source_dir: Path) -> None:
    """Rounding activations to bfloat16 is a loss, too."""
    change(source_dir / "split_tiles.h", right, wrong)

    with pytest.raises(ExecutorUnavailableError, match="its logits differ"):
        with_kernel(weighted("llama", "int8"), "tiles")
