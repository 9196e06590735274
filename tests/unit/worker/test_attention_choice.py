"""Attention by the lengths of sequences is used in recorded passes where it is equal to masked attention and faster."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from app.worker.execution import executor_selection
from app.worker.execution.base import AttentionSpec, ExecutorUnavailableError
from app.worker.execution.executor_selection import install_graphs, install_verified
from app.worker.execution.graphs import attention_choice
from app.worker.execution.graphs.attention_choice import faster_by_length
from app.worker.execution.graphs.decode_attention import write_tokens
from app.worker.execution.graphs.graph_executor import GraphExecutor, Pass
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import PackedBatch, Segment
from app.worker.execution.torch.equivalence import torch_runner
from tests.unit.worker.families import CONTEXT, FAMILIES, VOCABULARY, make

SLOTS = 5


class ByLength:
    """Attends row by row to the keys that each token sees, as a kernel does."""

    def __init__(self, *, slow_rows: int = 1000, unseen: int = 0, misread: bool = False) -> None:
        """Args:
        slow_rows: so many rows take long.
        unseen: keys that it takes for seen, after a token's own.
        misread: whether only the first row is right.
        """
        self._slow_rows = slow_rows
        self._unseen = unseen
        self._misread = misread

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        yield

    def write(self, states: Tensor, storage: Tensor, batch: PackedBatch) -> None:
        write_tokens(states, storage, batch)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch, spec: AttentionSpec, scale: float
    ) -> Tensor:
        if len(query) >= self._slow_rows:
            time.sleep(0.1)
        group, outs = spec.query_heads // spec.kv_heads, []
        places = zip(batch.slots.tolist(), batch.positions[0].tolist(), strict=True)
        for row, (slot, position) in enumerate(places):
            seen = slice(max(0, position + 1 - (spec.sliding_window or position + 1)), position + 1 + self._unseen)
            q, slot = query[row].view(spec.kv_heads, group, -1), 0 if self._misread else slot
            scores = q @ keys[slot, :, seen].mT * scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            outs.append((scores.softmax(-1) @ values[slot, :, seen]).flatten(0, 1))
        return torch.stack(outs)


def called(compute: Pass) -> Pass:
    """What a pass is where nothing is captured."""
    return compute


def long_runner() -> ModelRunner:
    """Slots so long that masked attention, which reads them to their end, takes long."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = hf.MistralConfig(vocab_size=VOCABULARY, max_position_embeddings=8192, sliding_window=8, **sizes)
    runner = torch_runner(hf.MistralForCausalLM(config), slots=SLOTS, length=8192)
    runner.reference_logits()
    return runner


def short_runner(family: str = "llama") -> ModelRunner:
    runner = torch_runner(make(FAMILIES[family]), slots=SLOTS, length=CONTEXT)
    runner.reference_logits()
    return runner


def test_it_is_used_for_the_numbers_of_rows_for_which_it_is_faster(caplog: pytest.LogCaptureFixture) -> None:
    """And the log says so, with times."""
    with caplog.at_level(logging.INFO, attention_choice.__name__):
        faster = faster_by_length(long_runner().cache, called, ByLength(slow_rows=4))

    assert [1, 2] == list(faster)
    assert "attention by lengths is used for 2 of 4 sizes of passes: 1 rows " in caplog.text


@pytest.mark.parametrize("wrong", [ByLength(unseen=1), ByLength(misread=True)], ids=["a key more", "another slot"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_what_does_not_compute_the_same_is_refused(family: str, wrong: ByLength) -> None:
    with pytest.raises(ExecutorUnavailableError, match="a head's attention differs by "):
        faster_by_length(short_runner(family).cache, called, wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_computes_the_same_is_not_refused(family: str) -> None:
    """With every window, soft cap and size of heads; afterwards the KV cache is empty."""
    runner = short_runner(family)

    faster_by_length(runner.cache, called, ByLength())

    assert not any(storage.any() for layer in range(3) for storage in runner.cache.layer(layer))


def test_where_there_is_no_memory_to_time_masked_attention_it_is_used() -> None:
    recorded: list[Pass] = []

    def record(compute: Pass) -> Pass:
        """Fails each second pass that is timed, which is that of masked attention."""
        recorded.append(compute)
        if len(recorded) > 1 and len(recorded) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute

    assert [1, 2, 4, SLOTS] == list(faster_by_length(short_runner().cache, record, ByLength(slow_rows=1)))


@pytest.mark.parametrize("by_length", [{1, 2, 4, SLOTS}, {1, 4}, {SLOTS}], ids=str)
def test_one_pass_serves_all_lengths(by_length: set[int]) -> None:
    """Of the rows that have such attention; the others have a pass for each number of keys, and may be divided."""
    computed, recorded = list[Pass](), list[Pass]()

    def record(compute: Pass) -> Pass:
        def counted() -> None:
            computed.append(compute)
            compute()

        recorded.append(counted)
        return counted

    one, other = short_runner(), short_runner()
    graphs = GraphExecutor(
        other.executor,
        other.cache,
        record,
        lambda found, expected: other.verify_logits(found, expected, 1e-4),
        min_keys=16,
        by_length={rows: ByLength() for rows in by_length},
    )
    install_verified(other, graphs, 1e-4)
    computed.clear()
    lengths = [40, 3, 20, 9, CONTEXT - 1]
    prompts = [Segment(row, 0, [1 + row] * end) for row, end in enumerate(lengths)]
    decodes = [Segment(row, end, [row]) for row, end in enumerate(lengths)]
    expected, found = (
        (runner.forward(prompts, [0] * SLOTS), runner.forward(decodes, [1] * SLOTS))[1] for runner in (one, other)
    )

    assert len(by_length) + 3 * (4 - len(by_length)) == len(recorded)
    assert (1 == len(computed)) == (SLOTS in by_length)
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


def decode_everywhere(runner: ModelRunner) -> Sequence[Tensor]:
    segments = [Segment(row, 0, [row + 1]) for row in range(SLOTS)]
    return [runner.forward(segments[:rows], [1] * rows) for rows in (1, 3, SLOTS)]


def refused_at_load(*args: object) -> dict[int, ByLength]:
    raise ModuleNotFoundError("No module named 'triton'")


def wrong_in_passes(*args: object) -> dict[int, ByLength]:
    return {1: ByLength(), SLOTS: ByLength(misread=True)}


@pytest.mark.parametrize(
    ("choose", "reason"),
    [
        (refused_at_load, "ModuleNotFoundError: No module named 'triton'"),
        (wrong_in_passes, "its logits differ by "),
    ],
)
def test_whatever_fails_leaves_masked_attention(
    choose: Callable[..., object], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In passes that are recorded all the same."""
    runner = short_runner()
    expected = decode_everywhere(runner)
    monkeypatch.setattr(executor_selection, "faster_by_length", choose)

    with caplog.at_level(logging.WARNING, executor_selection.__name__):
        install_graphs(runner, called)

    assert f"attention in recorded passes is left to torch: {reason}" in caplog.text
    assert "graphs" == runner.compiled
    for found, wanted in zip(decode_everywhere(runner), expected, strict=True):
        assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm())
