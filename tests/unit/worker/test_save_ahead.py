"""What slots will lose is copied to the prefix cache while the worker has nothing to do, in pieces."""

from collections.abc import Sequence

import pytest

from app.ipc.messages import Submit, TokenEvent
from app.types import SamplingParams
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.scheduling import batching_runner
from app.worker.scheduling.batching_runner import BatchingRunner
from tests.unit.ipc.test_worker_process import running
from tests.unit.worker.families import CONTEXT, FAMILIES, VOCABULARY, loaded, make
from tests.waiting import wait_for

Save = tuple[int, int, int]
"""The slot, its first token that was saved, and blocks."""
FIRST, SECOND = ([(5 * n + 3 * i) % VOCABULARY for i in range(40)] for n in range(2))
PARAMS = SamplingParams(max_tokens=4, temperature=0.0, logprobs=2)


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[Save]:
    """Every copy from a slot to the prefix cache."""
    copies, save = list[Save](), KVCache.save_prefix

    def record(cache: KVCache, slot: int, start: int, blocks: Sequence[int]) -> None:
        save(cache, slot, start, blocks)
        copies.append((slot, start, len(blocks)))

    monkeypatch.setattr(KVCache, "save_prefix", record)
    return copies


def runner_for(slots: int = 1, prefix_cache_bytes: int = 10**6) -> BatchingRunner:
    model = make(FAMILIES["llama"])
    model_runner = create_torch_runner(model, length=CONTEXT, slots=slots, free_bytes=10**9)
    return BatchingRunner(loaded(model), model_runner, prefix_cache_bytes=prefix_cache_bytes)


def complete(runner: BatchingRunner, prompt: Sequence[int]) -> list[TokenEvent]:
    events = list[TokenEvent]()
    runner.submit(Submit(1, tuple(prompt), PARAMS))
    while runner.busy:
        runner.step(events.extend)
    return events


def test_a_worker_without_requests_saves_what_the_next_one_overwrites(saves: list[Save]):
    """The next request then waits for no copy, and the one after it finds what the first had computed."""
    with running(runner_for()) as loop:
        loop.send(Submit(1, tuple(FIRST), PARAMS))
        loop.events_until_end()
        wait_for(lambda: saves == [(0, 0, 6)])

        loop.send(Submit(2, tuple(SECOND), PARAMS))
        loop.events_until_end()
        wait_for(lambda: saves == [(0, 0, 6)] * 2)
        loop.send(Submit(3, (*FIRST, 1), PARAMS))

        assert len(FIRST) == loop.events_until_end()[0].cached_tokens


def test_a_request_between_two_pieces_changes_no_bit(saves: list[Save], monkeypatch: pytest.MonkeyPatch):
    """All log-probabilities are those of conversations that were saved when their slot was needed."""
    monkeypatch.setattr(batching_runner, "AHEAD_BYTES", 1)
    ahead, late = runner_for(), runner_for()
    expected = [complete(late, prompt) for prompt in (FIRST, SECOND, [*FIRST, 1])]
    assert [(0, 0, 6), (0, 0, 6)] == saves
    saves.clear()

    found = [complete(ahead, FIRST)]
    assert ahead.save_ahead()
    assert ahead.save_ahead()
    found.append(complete(ahead, SECOND))
    while ahead.save_ahead():
        pass
    found.append(complete(ahead, [*FIRST, 1]))

    assert expected == found
    assert [(0, 0, 1), (0, 8, 1), (0, 16, 4), *((0, start, 1) for start in range(0, 48, 8))] == saves


def test_nothing_is_saved_ahead_of_a_live_request(saves: list[Save]):
    """Its step is what the time is for."""
    runner = runner_for(slots=2)
    for prompt in (FIRST, SECOND):
        complete(runner, prompt)
    runner.submit(Submit(1, (5,), PARAMS))
    assert not runner.save_ahead()
    while runner.busy:
        runner.step(lambda events: None)
    assert runner.save_ahead()


def test_without_a_prefix_cache_nothing_is_saved(saves: list[Save]):
    runner = runner_for(prefix_cache_bytes=0)
    complete(runner, FIRST)
    assert not runner.save_ahead()
    assert [] == saves
