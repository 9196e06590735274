"""Adapters are read beside the model's work: nothing waits for a file but the requests that need it."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

from app.ipc.messages import AdapterFailed, AdapterLoaded, Cancel, LoadAdapter, Submit, TokenEvent, UnloadAdapter
from app.types import SamplingParams
from app.worker.adapters import AdapterLoader
from app.worker.execution.linear_modules import LinearShape
from app.worker.loading.adapter_files import CONFIG, WEIGHTS, AdapterTarget
from tests.unit.ipc.test_worker_process import CountingRunner, Loop, running

LAYER = "model.layers.0.self_attn.q_proj"


@dataclass
class SlowAdapter:
    """An adapter whose weights arrive when the test says so: its file is a pipe."""

    folder: Path

    def __post_init__(self) -> None:
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2}
        (self.folder / CONFIG).write_text(json.dumps(config))
        os.mkfifo(self.folder / WEIGHTS)

    def load(self, number: int, digest: str | None = None) -> LoadAdapter:
        return LoadAdapter(number, str(self.folder / CONFIG), str(self.folder / WEIGHTS), 8, digest)

    def arrive(self) -> None:
        halves = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
        tensors = {f"base_model.model.{LAYER}.lora_{half}.weight": tensor for half, tensor in halves.items()}
        # Returns once somebody reads.
        (self.folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))


@dataclass
class Served:
    loop: Loop
    runner: CountingRunner
    adapter: SlowAdapter

    def submit(self, number: int, adapter: str | None = None) -> None:
        self.loop.send(Submit(number, (5,), SamplingParams(max_tokens=1), adapter=adapter))

    def complete(self, number: int) -> list[TokenEvent]:
        self.submit(number)
        return self.loop.events_until_end()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    runner = CountingRunner()
    loader = AdapterLoader(AdapterTarget({LAYER: LinearShape(4, 4)}, torch.float32, "cpu"), runner)
    with running(runner, adapters=loader) as loop:
        yield Served(loop, runner, SlowAdapter(tmp_path))


def first_load(served: Served) -> str:
    """Load the adapter and return its digest."""
    served.loop.send(served.adapter.load(100))
    served.adapter.arrive()
    loaded = served.loop.receive()
    assert isinstance(loaded, AdapterLoaded)
    return loaded.digest


def test_requests_go_on_while_an_adapter_is_read(served: Served):
    served.loop.send(served.adapter.load(1))
    for number in (2, 3):
        assert ["length"] == [event.finish for event in served.complete(number) if event.finish]

    served.adapter.arrive()
    loaded = served.loop.receive()
    assert isinstance(loaded, AdapterLoaded)
    assert (1, [loaded.digest]) == (loaded.id, served.runner.adapters)


def test_a_new_worker_holds_back_only_the_requests_of_an_adapter_that_it_reads_again(served: Served):
    """One that is cancelled meanwhile ends; the others run once it has been read."""
    digest = first_load(served)
    served.loop.send(UnloadAdapter(digest, 100))
    served.loop.send(served.adapter.load(1, digest))
    for number in (2, 3):
        served.submit(number, digest)
    assert {4} == {event.id for event in served.complete(4)}
    served.loop.send(Cancel(3))
    assert [TokenEvent(3, finish="abort")] == served.loop.events_until_end()

    served.adapter.arrive()
    assert isinstance(served.loop.receive(), AdapterLoaded)
    assert {2} == {event.id for event in served.loop.events_until_end()}
    assert [digest] == served.runner.adapters


def test_an_adapter_that_is_unloaded_while_it_is_read_again_is_not_kept(served: Served):
    digest = first_load(served)
    served.loop.send(served.adapter.load(1, digest))
    served.loop.send(UnloadAdapter(digest, 100))
    served.complete(2)
    served.adapter.arrive()

    assert AdapterFailed(1, "it was unloaded") == served.loop.receive()
    assert [] == served.runner.adapters


def test_other_files_than_before_are_refused(served: Served):
    first_load(served)
    served.loop.send(served.adapter.load(1, "another"))
    served.adapter.arrive()

    assert AdapterFailed(1, "its files have changed since it was loaded") == served.loop.receive()


def test_an_unload_spares_an_adapter_that_was_loaded_once_more_meanwhile(served: Served):
    """Whoever sent it had not read the answer to the second load, and counts on that one."""
    digest = first_load(served)
    served.loop.send(served.adapter.load(101))
    served.adapter.arrive()
    assert AdapterLoaded(101, digest, 2, 16, None) == served.loop.receive()
    assert [digest] == served.runner.adapters

    served.loop.send(UnloadAdapter(digest, 100))
    served.complete(1)
    assert [digest] == served.runner.adapters

    served.loop.send(UnloadAdapter(digest, 101))
    served.complete(2)
    assert [] == served.runner.adapters
