"""The native decoder: the logits of torch's layers for every supported model, and torch where they differ."""

import copy
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from app.ipc.messages import Compile
from app.worker.execution import executor_selection as acceleration
from app.worker.execution.executor_selection import accelerate
from app.worker.execution.model_runner import RowModel, make_row_model
from app.worker.execution.native import native_build
from app.worker.execution.native.native_build import CompileError
from app.worker.execution.native.packed_linear import NativeLinear
from app.worker.execution.packed_batch import Piece
from app.worker.execution.torch.quantization import quantize_linears
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


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
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


def accelerated(model: Any, setting: Compile = "layers", rows: int = 4) -> RowModel:
    rows_model = make_row_model(model, length=CONTEXT, rows=rows, free_bytes=10**9)
    accelerate(rows_model, setting)
    return rows_model


def halved(model: Any) -> Any:
    """Its weights rounded to bfloat16, as in most checkpoints, so that they are packed in 16 bits."""
    return model.to(torch.bfloat16).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("threads")
def test_native_layers_compute_the_logits_of_torch(kind: str) -> None:
    """Prompt chunks beside single tokens, some of which need no logits, slots with gaps between them."""
    rows, plain = accelerated(halved(make(KINDS[kind]))), RowModel(halved(make(KINDS[kind])), rows=4, length=CONTEXT)
    ids = [[(7 * row + 3 * place) % VOCABULARY for place in range(CONTEXT)] for row in range(4)]
    passes = [
        ([Piece(0, 0, ids[0][:9]), Piece(2, 0, ids[2][:30])], [False, True]),
        ([Piece(0, 9, ids[0][9:10]), Piece(2, 30, ids[2][30:31]), Piece(3, 0, ids[3][:5])], [True, True, False]),
        ([Piece(1, 0, ids[1][:40])], [False]),
        ([Piece(0, 10, ids[0][10:11]), Piece(3, 5, ids[3][5:6]), Piece(2, 31, ids[2][31:60])], [True] * 3),
        ([Piece(1, 40, ids[1][40:41])], [True]),
    ]

    assert "layers" == rows.compiled
    for pieces, wanted in passes:
        expected = plain.scores(pieces, wanted)
        found = rows.scores(pieces, wanted)
        assert expected.shape == found.shape
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("threads")
def test_in_bfloat16_logits_are_nearer_to_exact_ones_than_torchs(kind: str) -> None:
    """Hidden states are not rounded; keys, values and the operands of products are."""
    rows, exact = accelerated(make(KINDS[kind]).bfloat16()), RowModel(halved(make(KINDS[kind])), rows=4, length=CONTEXT)
    torchs = RowModel(make(KINDS[kind]).bfloat16(), rows=4, length=CONTEXT)
    ids = [(3 * place) % VOCABULARY for place in range(CONTEXT)]

    assert "layers" == rows.compiled
    for pieces in ([Piece(2, 0, ids[:50])], [Piece(0, 0, ids[:1]), Piece(2, 50, ids[50:60])], [Piece(2, 60, [1])]):
        wanted = [True] * len(pieces)
        expected = exact.scores(pieces, wanted)
        ours, theirs = (each.scores(pieces, wanted).float() - expected for each in (rows, torchs))
        assert ours.norm() <= theirs.norm()
        assert ours.norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "windows", "norms of heads"])
@pytest.mark.usefixtures("threads")
def test_in_bfloat16_the_bits_of_logits_do_not_depend_on_the_batch(kind: str) -> None:
    """Rounding to 16 bits would turn another order of sums into another completion of the same seed."""
    rows = accelerated(make(KINDS[kind]).bfloat16())
    ids = [(7 * place) % VOCABULARY for place in range(50)]
    expected = rows.scores([Piece(0, 0, ids)], [True])

    rows.scores([Piece(1, 0, ids[:20]), Piece(2, 0, ids[::-1])], [False, True])
    rows.scores([Piece(1, 20, ids[20:49])], [False])
    again = rows.scores([Piece(1, 49, ids[49:]), Piece(2, 50, [5]), Piece(3, 0, ids[:13])], [True] * 3)

    assert torch.equal(expected[0], again[0])


@pytest.mark.parametrize("window", [None, 200])
def test_long_chunks_compute_the_logits_of_torch(window: int | None) -> None:
    """More tokens than one block of the GEMM, beside another slot's, and key blocks that not all of them attend to."""
    long = {**SIZES, "max_position_embeddings": 512}

    def build() -> Any:
        return hf.MistralForCausalLM(hf.MistralConfig(**long, sliding_window=window))

    rows = make_row_model(make(build), length=512, rows=2, free_bytes=10**9)
    accelerate(rows, "layers")
    plain = RowModel(make(build), rows=2, length=512)
    ids = [(7 * place) % VOCABULARY for place in range(512)]

    for pieces in ([Piece(0, 0, ids[:300])], [Piece(1, 0, ids[:1]), Piece(0, 300, ids[300:490])]):
        wanted = [True] * len(pieces)
        expected = plain.scores(pieces, wanted)
        assert (rows.scores(pieces, wanted) - expected).norm() <= 1e-5 * expected.norm()


def test_float32_weights_stay_float32() -> None:
    """A model that was trained in float32 has weights that float16 does not hold."""
    rows, plain = accelerated(make(KINDS["llama"])), RowModel(make(KINDS["llama"]), rows=4, length=CONTEXT)
    pieces = [Piece(0, 0, [5, 6, 7, 8])]

    expected = plain.scores(pieces, [True])

    assert (rows.scores(pieces, [True]) - expected).norm() <= 1e-5 * expected.norm()
    kinds = {each.packed_weight.dtype for each in rows.model.modules() if isinstance(each, NativeLinear)}
    assert {torch.float32} == kinds


@pytest.mark.parametrize("kind", ["llama", "biases"])
def test_int8_weights_compute_the_logits_of_the_same_weights_in_torch(kind: str) -> None:
    """With an output projection of another type, with and without biases."""
    model = make(KINDS[kind])
    quantize_linears(model, torch.tensor([[5, 6, 7, 8]]), integers=False)
    plain = RowModel(copy.deepcopy(model), rows=4, length=CONTEXT)
    rows = accelerated(model)
    pieces = [Piece(0, 0, [5]), Piece(1, 0, [(7 * place) % VOCABULARY for place in range(40)])]

    expected = plain.scores(pieces, [True, True])

    assert (rows.scores(pieces, [True, True]) - expected).norm() <= 1e-5 * expected.norm()
    kinds = [each.packed_weight.dtype for each in rows.model.modules() if isinstance(each, NativeLinear)]
    assert {torch.int8: len(kinds) - 1, torch.float32: 1} == Counter(kinds)


def test_nan_stays_in_its_slot() -> None:
    rows = accelerated(make(KINDS["llama"]))
    rows.scores([Piece(0, 0, [1, 2, 3]), Piece(1, 0, [1, 2, 3])], [True, True])
    with torch.inference_mode():
        rows.cache.layer(1)[0][0, 0, 1, 0] = float("nan")

    found = rows.scores([Piece(0, 3, [4]), Piece(1, 3, [4])], [True, True])

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
    """With the reason in the log; where the setting asks for compiled layers, it is raised instead."""
    with caplog.at_level(logging.WARNING, acceleration.__name__):
        rows = accelerated(model().eval(), "auto")

    assert rows.compiled != "layers"
    assert f"layers are left to torch: {reason}" in caplog.text
    assert rows.probe().isfinite().all()
    with pytest.raises(CompileError, match=reason):
        accelerated(model().eval(), "layers")


@pytest.mark.parametrize(
    ("source", "right", "wrong", "dtype"),
    [
        ("llama_forward.cpp", "* factor *", "*", torch.float32),
        ("llama_forward.cpp", "first * cos[left] -", "0.0f / 0.0f -", torch.float32),
        ("llama_forward.cpp", "linear<true>(x", "linear<false>(x", torch.float32),
        ("llama_forward.cpp", "silu(gate) * up)", "gate * up)", torch.float32),
        ("gemm_packed.h", "right * factor;", "right;", torch.float32),
        ("attention_decode.h", "scale * load(q + at)", "load(q + at)", torch.bfloat16),
        ("bf16.h", "pairs[panel], factor);", "pairs[panel], factor << 16);", torch.bfloat16),
    ],
)
def test_a_wrong_kernel_is_not_used(source: str, right: str, wrong: str, dtype: torch.dtype, source_dir: Path) -> None:
    """A compiler may be wrong about the machine; the logits are compared at load, and a model whose logits differ is
    served by torch, whatever the kernel wrote to the KV cache."""
    path = source_dir / source
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    expected = RowModel(make(KINDS["llama"]).to(dtype), rows=4, length=CONTEXT).probe()

    rows = accelerated(make(KINDS["llama"]).to(dtype), "auto")

    assert rows.compiled != "layers"
    assert (rows.probe() - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_on_a_processor_with_amx_bfloat16_layers_are_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """oneDNN uses those instructions (AMX); the setting `layers` overrules that."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)

    settings: tuple[Compile, ...] = ("auto", "attention", "layers")
    by_setting = {each: accelerated(make(KINDS["llama"]).bfloat16(), each) for each in settings}
    found = {each: rows.compiled for each, rows in by_setting.items()}
    by_torch = [*by_setting["auto"].model.modules(), *by_setting["attention"].model.modules()]

    assert {"auto": "attention", "attention": "attention", "layers": "layers"} == found
    assert not any(isinstance(each, NativeLinear) for each in by_torch)
    assert "layers" == accelerated(make(KINDS["llama"]), "auto").compiled
