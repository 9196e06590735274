"""What a worker's environment holds, and what the worker's loop does with messages."""

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import zmq
from torch import Tensor

from app.embeddings import EmbeddingInfo
from app.ipc.messages import (
    Cancel,
    Embed,
    Embedded,
    FromWorker,
    ModelSpec,
    Shutdown,
    Step,
    Submit,
    TokenEvent,
    ToWorker,
    decode_from_worker,
    encode,
)
from app.ipc.worker_process import worker_environment
from app.types import SamplingParams
from app.worker.adapters import AdapterLoader
from app.worker.embedding.embedding_runner import EmbeddingRunner
from app.worker.embedding.encoder import pad_right
from app.worker.embedding.pooling import Head
from app.worker.execution.lora import LoraAdapter
from app.worker.heartbeat import PROGRESS
from app.worker.process import Runner, Worker

LOCAL = ModelSpec(name="m", source="local", device="cpu", dtype="auto", revision=None, max_model_len=None, threads=0)
HUB = ModelSpec(name="m", source="hub", device="cpu", dtype="auto", revision=None, max_model_len=None, threads=0)


def test_a_worker_gets_none_of_the_services_secrets():
    """Only what a model needs is passed on; what a new version of the service adds stays out by itself."""
    own = {
        "PATH": "/bin",
        "HF_HOME": "/hub",
        "SECURITY__API_KEY": "k",
        "DATABASE_URL": "d",
        "HF_TOKEN": "t",
        "NEW": "n",
    }

    passed = worker_environment(own, LOCAL, "token")

    assert ("/bin", "/hub") == (passed["PATH"], passed["HF_HOME"])
    assert {"k", "d", "t", "n", "token"}.isdisjoint(passed.values())


def test_a_local_model_never_reaches_the_hub():
    """The hub is off for a folder; for a hub model it is on, with the token that was given."""
    local, hub = worker_environment({}, LOCAL, "token"), worker_environment({}, HUB, "token")

    assert ("1", None) == (local["HF_HUB_OFFLINE"], local.get("HF_TOKEN"))
    assert (None, "token") == (hub.get("HF_HUB_OFFLINE"), hub["HF_TOKEN"])
    assert "1" == hub["HF_HUB_DISABLE_TELEMETRY"]


def test_the_older_name_of_the_folder_of_downloads_counts_where_no_newer_one_is_set():
    older = {"TRANSFORMERS_CACHE": "/older"}

    assert "/older" == worker_environment(older, HUB, None)["HF_HUB_CACHE"]
    assert "HF_HUB_CACHE" not in worker_environment({**older, "HF_HOME": "/newer"}, HUB, None)
    assert "/newer" == worker_environment({**older, "HF_HUB_CACHE": "/newer"}, HUB, None)["HF_HUB_CACHE"]


def test_how_threads_wait_is_the_operators_choice():
    """They do not spin, unless the service was started with another word."""
    assert "8000" == worker_environment({}, LOCAL, None)["GOMP_SPINCOUNT"]
    assert "9" == worker_environment({"GOMP_SPINCOUNT": "9"}, LOCAL, None)["GOMP_SPINCOUNT"]
    chosen = worker_environment({"OMP_WAIT_POLICY": "active"}, LOCAL, None)
    assert ("active", None) == (chosen["OMP_WAIT_POLICY"], chosen.get("GOMP_SPINCOUNT"))


class CountingRunner:
    """Generates the tokens 0, 1, 2, ... for one request after another."""

    name = "counting"
    slots = 1
    unsupported: tuple[str, ...] = ()
    compiled = None
    step_times = ()
    context_length = 100
    preemptions = 2

    def __init__(self) -> None:
        self.waiting: list[Submit] = []
        self.cancelled: set[int] = set()
        self.adapters: list[str] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def submit(self, request: Submit) -> None:
        self.waiting.append(request)

    def cancel(self, request_id: int) -> None:
        self.cancelled.add(request_id)

    def step(self, exchange: Callable[[list[TokenEvent]], None]) -> None:
        request = self.waiting.pop(0)
        for _ in request.prompt_ids[1:]:
            exchange([])
        for token in range(request.params.max_tokens):
            if request.id in self.cancelled:
                exchange([TokenEvent(request.id, finish="abort")])
                return
            exchange([TokenEvent(request.id, (token,))])
        exchange([TokenEvent(request.id, finish="length")])

    def save_ahead(self) -> bool:
        return False

    def add_adapter(self, adapter: LoraAdapter) -> None:
        self.adapters.append(adapter.digest)

    def remove_adapter(self, digest: str) -> None:
        if digest in self.adapters:
            self.adapters.remove(digest)


class LengthEncoder:
    """The hidden state of each token is how many the text has."""

    vocab_size = 100
    info = EmbeddingInfo(dimension=1, max_tokens=100, pooling=("mean",), normalized=False)
    head = Head()

    def pad(self, token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return pad_right(token_ids, 0, "cpu")

    def hidden_states(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        return mask.sum(dim=1, keepdim=True).float().expand(mask.shape).unsqueeze(-1)


class Loop:
    """A worker's loop in a thread, and the parent's end of its socket."""

    def __init__(
        self,
        runner: Runner | None = None,
        embedder: EmbeddingRunner | None = None,
        adapters: AdapterLoader | None = None,
    ) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.bind("inproc://channel")
        self.theirs = self.context.socket(zmq.PAIR)
        self.theirs.connect("inproc://channel")
        self.thread = threading.Thread(target=Worker(self.theirs, runner, embedder, adapters).run)
        self.thread.start()

    def send(self, message: ToWorker) -> None:
        self.socket.send(encode(message))

    def receive(self) -> FromWorker:
        assert self.socket.poll(10_000)
        message: FromWorker = decode_from_worker(self.socket.recv())
        return message

    def events_until_end(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        while not events or not (events[-1].finish or events[-1].error):
            step = self.receive()
            assert isinstance(step, Step)
            events.extend(step.events)
        return events


@contextmanager
def running(
    runner: Runner | None = None,
    embedder: EmbeddingRunner | None = None,
    adapters: AdapterLoader | None = None,
) -> Iterator[Loop]:
    loop = Loop(runner, embedder, adapters)
    yield loop
    loop.send(Shutdown())
    loop.thread.join(10)
    loop.context.destroy(linger=0)


@pytest.fixture
def loop() -> Iterator[Loop]:
    with running(CountingRunner()) as loop:
        yield loop


def test_a_request_completes_event_by_event(loop: Loop):
    """Each token as it is sampled, then the end; a second request finds the loop waiting."""
    for number in (1, 2):
        loop.send(Submit(number, (5,), SamplingParams(max_tokens=2)))

        assert [((0,), None), ((1,), None), ((), "length")] == [
            (event.token_ids, event.finish) for event in loop.events_until_end()
        ]


def test_a_step_without_events_is_progress_and_no_message(loop: Loop):
    """The steps of a long prompt have no events; the next message says how long they took."""
    before = PROGRESS.count

    loop.send(Submit(1, (5,) * 4, SamplingParams(max_tokens=1)))

    first, second = loop.receive(), loop.receive()
    assert isinstance(first, Step)
    assert isinstance(second, Step)
    assert [[TokenEvent(1, (0,))], [TokenEvent(1, finish="length")]] == [first.events, second.events]
    assert 5 == PROGRESS.count - before
    assert ((4, 2), (1, 0)) == ((len(first.seconds), first.preempted), (len(second.seconds), second.preempted))
    assert all(each >= 0 for each in first.seconds)


def test_a_cancel_is_read_between_two_tokens(loop: Loop):
    """Long before the completion would end, and with the next request already there."""
    loop.send(Submit(1, (5,), SamplingParams(max_tokens=10_000_000)))
    loop.receive()
    loop.send(Submit(2, (5,), SamplingParams(max_tokens=1)))
    loop.send(Cancel(1))

    assert "abort" == loop.events_until_end()[-1].finish
    assert 2 == loop.events_until_end()[-1].id


def test_shutdown_stops_the_loop_in_the_middle_of_a_completion(loop: Loop):
    """The running request is ended first, so that nothing is cut off in the model."""
    loop.send(Submit(1, (5,), SamplingParams(max_tokens=10_000_000)))
    loop.receive()
    loop.send(Shutdown())

    assert "abort" == loop.events_until_end()[-1].finish
    loop.thread.join(10)
    assert not loop.thread.is_alive()


def test_an_encoder_embeds_and_reports_begin_vectors_and_end():
    with running(embedder=EmbeddingRunner(LengthEncoder(), 8)) as loop:
        loop.send(Embed(1, ((5, 5), (5, 5, 5))))
        received = [loop.receive() for _ in range(2)]
    vectors = (struct.pack("<f", 3.0), struct.pack("<f", 2.0))
    assert [Embedded(1, (1, 0), vectors), Step([TokenEvent(1), TokenEvent(1, finish="stop")])] == received


def test_texts_are_embedded_between_the_tokens_of_a_completion():
    """One pass after each step: neither waits for the end of the other."""
    with running(CountingRunner(), EmbeddingRunner(LengthEncoder(), 1)) as loop:
        loop.send(Submit(1, (5,), SamplingParams(max_tokens=10_000_000)))
        loop.receive()
        loop.send(Embed(2, ((5,),) * 3))
        tokens, embedded = 0, 0
        while embedded < 3:
            match loop.receive():
                case Embedded():
                    embedded += 1
                case Step(events=events) if events[0].id == 1:
                    tokens += embedded in (1, 2)
        assert tokens >= 2
        loop.send(Cancel(1))
        ends = [event.finish for _ in range(2) for event in loop.events_until_end()]
        assert "abort" == ends[-1]


def test_a_cancelled_embedding_ends_before_the_next_pass():
    with running(embedder=EmbeddingRunner(LengthEncoder(), 1)) as loop:
        loop.send(Embed(1, ((5,),) * 20_000))
        loop.receive()
        loop.send(Cancel(1))
        while not isinstance(message := loop.receive(), Step) or not message.events[-1].finish:
            continue
        assert [TokenEvent(1, finish="abort")] == message.events


def test_what_a_model_does_not_do_is_refused():
    with running(embedder=EmbeddingRunner(LengthEncoder(), 8)) as loop:
        loop.send(Submit(1, (5,), SamplingParams(max_tokens=1)))
        (event,) = loop.events_until_end()
        assert (1, True) == (event.id, event.invalid)
    with running(CountingRunner()) as loop:
        loop.send(Embed(1, ((5,),)))
        (event,) = loop.events_until_end()
        assert (1, True) == (event.id, event.invalid)
