"""The runner of embedding requests: begins, ends, cancels and fails them one by one."""

import struct
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from app.embeddings import EmbeddingInfo
from app.ipc.messages import Embed, Embedded, TokenEvent
from app.worker.embedding.embedding_runner import EmbeddingRunner
from app.worker.embedding.encoder import pad_right
from app.worker.embedding.pooling import Head

BAD, SICK = 66, 77
"""A token on which the model fails, and one for which its numbers are none."""


class SumEncoder:
    """The hidden state of a token is its id; records the size of each pass."""

    vocab_size = 100
    info = EmbeddingInfo(dimension=1, max_tokens=8, pooling=("mean",), normalized=False)
    head = Head(("mean",))

    def __init__(self) -> None:
        self.passes: list[tuple[int, int]] = []
        self.device_failed = False

    def pad(self, token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return pad_right(token_ids, 0, "cpu")

    def hidden_states(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        self.passes.append((token_ids.shape[0], token_ids.shape[1]))
        if self.device_failed:
            raise torch.AcceleratorError("gone")
        if (token_ids == BAD).any():
            raise torch.OutOfMemoryError("no memory")
        states = token_ids.float().unsqueeze(-1)
        return torch.where(states == SICK, torch.full_like(states, float("nan")), states)


class Reports:
    """What a runner has reported."""

    def __init__(self) -> None:
        self.vectors: dict[tuple[int, int], float] = {}
        self.events: list[TokenEvent] = []

    def __call__(self, embedded: list[Embedded], events: list[TokenEvent]) -> None:
        for message in embedded:
            for place, vector in zip(message.positions, message.vectors, strict=True):
                (self.vectors[message.id, place],) = struct.unpack("<f", vector)
        self.events += events


@pytest.fixture
def encoder() -> SumEncoder:
    return SumEncoder()


def drain(runner: EmbeddingRunner) -> Reports:
    reports = Reports()
    while runner.busy:
        runner.step(reports)
    return reports


def test_a_request_begins_and_ends_once_and_has_all_its_vectors(encoder: SumEncoder):
    runner = EmbeddingRunner(encoder, 8)
    runner.submit(Embed(1, ((1, 3), (5,), (2, 4, 6), (8,))))
    reports = drain(runner)

    assert {(1, 0): 2.0, (1, 1): 5.0, (1, 2): 4.0, (1, 3): 8.0} == reports.vectors
    assert [TokenEvent(1), TokenEvent(1, finish="stop")] == reports.events
    assert [(2, 3), (2, 1)] == encoder.passes


def test_requests_share_a_pass(encoder: SumEncoder):
    runner = EmbeddingRunner(encoder, 8)
    for number in (1, 2):
        runner.submit(Embed(number, ((number,),), tenant=str(number)))
    assert {(1, 0): 1.0, (2, 0): 2.0} == drain(runner).vectors
    assert [(2, 1)] == encoder.passes


def test_a_cancelled_request_ends_before_the_next_pass(encoder: SumEncoder):
    runner, reports = EmbeddingRunner(encoder, 1), Reports()
    runner.submit(Embed(1, ((1,), (2,), (3,))))
    runner.step(reports)
    runner.cancel(1)
    runner.cancel(99)
    while runner.busy:
        runner.step(reports)
    assert {(1, 0): 1.0} == reports.vectors
    assert [TokenEvent(1), TokenEvent(1, finish="abort")] == reports.events
    assert 1 == len(encoder.passes)


@pytest.mark.parametrize(
    ("token", "message"), [(BAD, "ran out of memory"), (SICK, "numbers for this text are not finite")]
)
def test_a_text_that_fails_ends_its_request_and_no_other(token: int, message: str, encoder: SumEncoder):
    runner = EmbeddingRunner(encoder, 8)
    runner.submit(Embed(1, ((1,), (token,))))
    runner.submit(Embed(2, ((3,),)))
    reports = drain(runner)

    assert 3.0 == reports.vectors[2, 0]
    ends = {event.id: event for event in reports.events if event.finish or event.error}
    assert "stop" == ends[2].finish
    assert ends[1].error is not None
    assert message in ends[1].error
    assert not ends[1].invalid


def test_a_failed_device_is_the_end_of_the_process(encoder: SumEncoder):
    runner = EmbeddingRunner(encoder, 8)
    encoder.device_failed = True
    runner.submit(Embed(1, ((1,),)))
    with pytest.raises(torch.AcceleratorError):
        runner.step(Reports())


@pytest.mark.parametrize("inputs", [(), ((),), ((1,) * 9,), ((100,),), ((-1,),)])
def test_what_the_model_cannot_read_is_refused_before_it_runs(inputs: tuple[tuple[int, ...], ...], encoder: SumEncoder):
    runner = EmbeddingRunner(encoder, 8)
    runner.submit(Embed(1, inputs))
    (event,) = drain(runner).events
    assert event.invalid
    assert [] == encoder.passes


def test_each_request_has_vectors_of_its_own_length(encoder: SumEncoder):
    encoder.hidden_states = lambda token_ids, mask: token_ids.float().unsqueeze(-1).repeat(1, 1, 4)  # type: ignore[method-assign]
    lengths: dict[int, int] = {}
    runner = EmbeddingRunner(encoder, 8)
    runner.submit(Embed(1, ((1,),), dimensions=2))
    runner.submit(Embed(2, ((1,),)))

    def report(embedded: list[Embedded], events: list[TokenEvent]) -> None:
        lengths.update({message.id: len(message.vectors[0]) // 4 for message in embedded})

    while runner.busy:
        runner.step(report)
    assert {1: 2, 2: 4} == lengths
