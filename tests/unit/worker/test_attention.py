"""Native attention: it computes what torch computes, and torch computes where it cannot be built."""

import logging
import math
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.worker.execution import executor_selection
from app.worker.execution.executor_selection import install_verified, select_executor
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.native import native_build
from app.worker.execution.native.attention import AttentionShape as Shape
from app.worker.execution.native.attention import NativeAttention
from app.worker.execution.native.native_build import CompileError
from app.worker.execution.native.native_executors import NativeAttentionExecutor
from app.worker.execution.packed_batch import Segment
from app.worker.execution.torch.equivalence import torch_runner
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.execution.transformers_forward import TransformersForward
from tests.unit.worker.families import CONTEXT, FAMILIES, VOCABULARY, make

LENGTH = 200
BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("compiler")


def full_length(*values: Any) -> Any:
    """A case that `make test-long` runs: each shape takes seconds to compile."""
    return pytest.param(*values, marks=pytest.mark.soak)


def selected(model: Any) -> ModelRunner:
    """A runner with the executor that is selected by default."""
    runner = create_torch_runner(model, length=CONTEXT, slots=2, free_bytes=10**9)
    select_executor(runner, "auto")
    return runner


def with_native_attention(model: Any, slots: int = 2) -> ModelRunner:
    """A runner whose model is torch's but for attention."""
    runner = create_torch_runner(model, length=CONTEXT, slots=slots, free_bytes=10**9)
    forward = TransformersForward(model, runner.cache)
    install_verified(runner, NativeAttentionExecutor(forward, runner.cache), tolerance=1e-4)
    return runner


def random_cache(shape: Shape, slots: int, generator: torch.Generator) -> Tensor:
    """Keys or values of one layer, (slots, KV heads, LENGTH, head size)."""
    return torch.randn(slots, shape.num_kv_heads, LENGTH, shape.head_size, generator=generator).to(shape.dtype)


def random_queries(shape: Shape, tokens: int, generator: torch.Generator) -> Tensor:
    """(tokens, heads, head size)"""
    heads = shape.num_kv_heads * shape.queries_per_kv
    return torch.randn(tokens, heads, shape.head_size, generator=generator).to(shape.dtype)


def attended(shape: Shape, q: Tensor, keys: Tensor, values: Tensor, places: list[tuple[int, int, int]]) -> Tensor:
    """The attention that torch computes for each token, by (row, first key, end)."""
    found = []
    for token, (row, first, end) in enumerate(places):
        k, v = (each[row, :, first:end].repeat_interleave(shape.queries_per_kv, 0) for each in (keys, values))
        weights = torch.softmax(k @ q[token, :, :, None] / math.sqrt(shape.head_size), dim=1)
        found.append((weights.mT @ v)[:, 0])
    return torch.stack(found)


@pytest.mark.parametrize(
    "shape",
    [
        *(Shape(1, 1, 8), Shape(3, 3, 64), Shape(1, 2, 24, BF16), Shape(1, 7, 80, BF16)),
        *map(full_length, (Shape(2, 1, 48), Shape(1, 7, 80), Shape(2, 4, 128), Shape(1, 16, 256))),
        *map(full_length, (Shape(3, 3, 64, BF16), Shape(2, 13, 128, BF16))),
    ],
    ids=str,
)
def test_native_attention_equals_torchs(shape: Shape) -> None:
    """For few and many heads of all sizes, any number of keys, fewer than a vector holds and more, and any number of
    neighbouring tokens: from one to more than one segment holds, each with its own key range."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (random_cache(shape, 4, generator) for _ in range(2))
    segments = [(3, 1, 2), (0, 7, 8), (2, 8, 9), (3, 40, 41), (1, LENGTH - 1, LENGTH + 1), (2, 20, 25), (0, 90, 160)]
    native = NativeAttention(shape)
    for window in (LENGTH, 37):
        places = [(row, max(0, end - window), end) for row, begin, stop in segments for end in range(begin, stop)]
        q = random_queries(shape, len(places), generator)
        rows, first, end = torch.tensor(places).T.contiguous()
        out = torch.full_like(q, float("nan"))

        native.attend(q, keys, values, out, rows, (first, end), 1 / math.sqrt(shape.head_size))

        expected = attended(shape, q.float(), keys.float(), values.float(), places)
        assert (out - expected).norm() <= (1e-5 if shape.dtype == torch.float32 else 5e-3) * expected.norm()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there it can be chosen what the processor may do")
def test_bfloat16_needs_no_avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated in float32, it rounds the same values; only the order of sums differs."""
    generator = torch.Generator().manual_seed(1)
    shape = Shape(3, 3, 64, BF16)
    keys, values = (random_cache(shape, 1, generator) for _ in range(2))
    q = random_queries(shape, 51, generator)
    rows, first, end = torch.zeros(3, 51, dtype=torch.int64)
    end += torch.arange(150, 201)
    found = []
    for flags in (native_build.FLAGS, (*native_build.FLAGS, "-mno-avx512bf16")):
        monkeypatch.setattr(native_build, "FLAGS", flags)
        native = NativeAttention(shape)
        for part in (slice(0, 1), slice(1, 51)):
            found.append(torch.empty_like(q[part]))
            places = rows[part], (first[part], end[part])
            native.attend(q[part], keys, values, found[-1], *places, 1 / math.sqrt(shape.head_size))

    for ours, theirs in ((found[0], found[2]), (found[1], found[3])):
        assert (ours - theirs).float().norm() <= 5e-3 * theirs.float().norm()


@pytest.mark.parametrize("window", [LENGTH, 37, 150])
@pytest.mark.parametrize(
    "shape",
    [Shape(1, 7, 80, BF16), *map(full_length, (Shape(3, 3, 64, BF16), Shape(2, 1, 128, BF16)))],
    ids=str,
)
@pytest.mark.parametrize("flag", [None, "-mno-avx512bf16"])
def test_the_bits_of_a_token_do_not_depend_on_its_batch(
    flag: str | None, shape: Shape, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit in 16 bits, where another order of sums would show: a prompt in whatever segments, down to one token,
    gives a seed's answer again."""
    if flag is not None:
        if platform.machine() != "x86_64":
            pytest.skip("only on x86 it can be chosen what the processor may do")
        monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, flag))
    generator = torch.Generator().manual_seed(1)
    native = NativeAttention(shape)
    keys, values = (random_cache(shape, 1, generator) for _ in range(2))
    q = 3 * random_queries(shape, LENGTH, generator)
    rows, end = torch.zeros(LENGTH, dtype=torch.int64), torch.arange(LENGTH) + 1
    first = (end - window).clamp(min=0)
    found = []
    for size in (1, 7, 50, LENGTH):
        out = torch.empty_like(q)
        for at in range(0, LENGTH, size):
            part = slice(at, min(at + size, LENGTH))
            native.attend(q[part], keys, values, out[part], rows[part], (first[part], end[part]), 0.1)
        found.append(out)

    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.mark.parametrize(
    ("size", "dtype"), [(8, torch.float32), (16, BF16), full_length(8, BF16), full_length(16, torch.float32)]
)
def test_softmax_is_right_for_extreme_scores(size: int, dtype: torch.dtype) -> None:
    """Equal scores have equal weights, one far above the others takes all, and none overflows; in decode attention
    (head size 8) and prefill attention (16)."""
    shape = Shape(1, 1, size, dtype)
    keys, values = torch.zeros(1, 1, 16, size), torch.arange(16.0).view(1, 1, 16, 1).repeat(1, 1, 1, size)
    keys[0, 0, 5] = 1
    keys, values = keys.to(dtype), values.to(dtype)
    rows, first, end = torch.tensor([[0] * 4, [0] * 4, [16] * 4])
    q = torch.tensor([0.0, 1e4, -1e4, 1e30]).view(4, 1, 1).repeat(1, 1, size).to(dtype)
    out = torch.empty_like(q)

    NativeAttention(shape).attend(q, keys, values, out, rows, (first, end), 1.0)

    others = (sum(range(16)) - 5) / 15
    expected = torch.tensor([7.5, 5.0, others, 5.0])
    assert torch.allclose(out[:, 0, 0].float(), expected, rtol=1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize(
    ("size", "dtype"), [(16, torch.float32), (32, BF16), full_length(16, BF16), full_length(32, torch.float32)]
)
def test_nan_stays_in_its_slot(size: int, dtype: torch.dtype) -> None:
    """The runner finds it in that slot's logits and ends that sequence only; keys past the end are not read."""
    shape = Shape(2, 2, size, dtype)
    keys, values = torch.randn(2, 3, 2, 20, size).to(dtype).unbind()
    keys[1, 0, 3, 2] = keys[2, 0, 17, 0] = values[2, 1, 17, 0] = float("nan")
    rows, first, end = torch.tensor([[0, 1, 2, 2], [0, 0, 0, 0], [16, 16, 16, 17]])
    q = torch.randn(4, 4, size).to(dtype)
    out = torch.empty_like(q)

    NativeAttention(shape).attend(q, keys, values, out, rows, (first, end), 0.3)

    assert [True, False, True, True] == [bool(each.isfinite().all()) for each in out]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# The runner's tests compare the completions of the other families with those of `generate`.
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral with a window"])
@pytest.mark.usefixtures("two_threads")
def test_a_model_scores_alike_with_compiled_attention(family: str) -> None:
    """Pieces of prompts beside single tokens, windows narrower than what is there, rows with gaps between them."""
    runner = with_native_attention(make(FAMILIES[family]), slots=4)
    plain = torch_runner(make(FAMILIES[family]), slots=4, length=CONTEXT)
    ids = [[(7 * row + 3 * place) % VOCABULARY for place in range(CONTEXT)] for row in range(4)]
    passes = [
        [Segment(0, 0, ids[0][:9]), Segment(2, 0, ids[2][:30])],
        [Segment(0, 9, ids[0][9:10]), Segment(2, 30, ids[2][30:31]), Segment(3, 0, ids[3][:5])],
        [Segment(0, 10, ids[0][10:11]), Segment(3, 5, ids[3][5:6]), Segment(2, 31, ids[2][31:40])],
    ]

    assert "attention" == runner.compiled
    for segments in passes:
        wanted = [True] * len(segments)
        expected = plain.forward(segments, wanted)
        assert (runner.forward(segments, wanted) - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(
    "segment", [Segment(2, 0, [1]), Segment(-1, 0, [1]), Segment(0, -1, [1]), Segment(1, CONTEXT - 1, [1, 2])]
)
def test_nothing_is_written_outside_of_the_rows(segment: Segment) -> None:
    """A program in C++ would write over whatever is there."""
    runner = with_native_attention(make(FAMILIES["llama"]))

    with pytest.raises(IndexError, match="outside of the KV cache slots"):
        runner.forward([segment], [True])


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_unsupported_attention_is_left_to_torch(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Soft-capped scores and float16; the reason is logged."""
    model = make(FAMILIES[family])
    model = model if family == "gemma2" else model.to(torch.float16)

    with caplog.at_level(logging.WARNING, executor_selection.__name__):
        runner = selected(model)

    assert runner.compiled is None
    assert "native attention: its attention is not of one kind" in caplog.text


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "there is no C\\+\\+ compiler"),
        ("echo 'no such flag' >&2; exit 1", "fails: no such flag"),
        ("exit 0", "nothing can be compiled with .*cannot open"),
    ],
)
def test_without_a_compiler_that_works_the_model_is_served_by_torch(
    compiler: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler, one that fails, one that writes no library."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if compiler is not None:
        script = tmp_path / "c++"
        script.write_text(f"#!/bin/sh\n{compiler}\n")
        script.chmod(0o755)

    with pytest.raises(CompileError, match=reason):
        NativeAttention(Shape(1, 1, 8))
    assert selected(make(FAMILIES["llama"])).compiled is None


def test_a_head_that_fills_no_vectors_is_left_to_torch() -> None:
    with pytest.raises(CompileError, match="heads of 20 numbers"):
        NativeAttention(Shape(1, 1, 20))


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        ("attention_decode.h", "scale * reduce_sum(sums[query])", "reduce_sum(sums[query])"),
        (
            "attention_prefill.h",
            "scale * load(q + query_offset(query) + element)",
            "load(q + query_offset(query) + element)",
        ),
        ("attention_prefill.h", ": end_key[token] - begin", ": count"),
    ],
)
def test_a_wrong_kernel_is_not_used(
    source: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler may be wrong about the machine; the self-test covers decode and prefill attention and the mask."""
    shutil.copytree(native_build.SOURCE_DIR, tmp_path, dirs_exist_ok=True)
    header = tmp_path / source
    text = header.read_text()
    assert text.count(right) == 1
    header.write_text(text.replace(right, wrong))
    monkeypatch.setattr(native_build, "SOURCE_DIR", tmp_path)

    with pytest.raises(CompileError, match="computes something else"):
        NativeAttention(Shape(2, 2, 16))
