"""Streams and whole answers: every way out closes the generator."""

import asyncio
import gc
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
import structlog
from app.generation.requests import Delta, Ending, Event, Finished, Started
from starlette.requests import Request

from app.errors import AppError, ClientDisconnected, EngineFailed
from app.types import FinishReason, Usage
from app.web.http.errors import envelope
from app.web.http.sse import EventStream, cancel_on_disconnect, collect_response, frame, wait_for_start

ENDING = Ending(finish_reason=FinishReason.STOP, tokens=1)
FINISHED = Finished(model="m", endings=(ENDING,), usage=Usage(1, 1), cached=False)


class Answer:
    """A generation that records whether it was closed."""

    def __init__(self, *steps: Event | float | Exception) -> None:
        self.steps = steps
        self.closed = False
        self.events = self._play()

    async def _play(self) -> AsyncGenerator[Event, None]:
        try:
            for step in self.steps:
                match step:
                    case int() | float():
                        await asyncio.sleep(step)
                    case Exception():
                        raise step
                    case _:
                        yield step
        finally:
            # Like an engine's abort: closing takes some turns of the loop, and must not be cut short.
            await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)
            self.closed = True


class Client:
    """The other end of an ASGI connection."""

    def __init__(self, leaves_after: float = 60, reads: bool = True) -> None:
        self.leaves_after = leaves_after
        self.reads = reads
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(self.leaves_after)
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if not self.reads and len(self.sent) > 2:
            await asyncio.sleep(60)

    @property
    def request(self) -> Request:
        return Request({"type": "http", "headers": []}, self.receive)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


class PlainEncoder:
    """The simplest stream encoder."""

    def encode(self, event: Event) -> bytes:
        match event:
            case Delta():
                return frame({"content": event.text}, "delta")
            case Finished():
                return frame({}, "done")
        return b""

    def encode_error(self, error: AppError) -> bytes:
        return frame(envelope(error, "r1"), "error")


async def serve(answer: Answer, client: Client, **options: float) -> None:
    stream = EventStream(Started(model="m"), answer.events, PlainEncoder(), **options)
    async with asyncio.timeout(5):
        await stream({"type": "http", "method": "POST"}, client.receive, client.send)


async def test_a_whole_stream_is_sent_and_closed():
    answer, client = Answer(Started(model="m"), Delta(text="ä\n"), FINISHED), Client()

    await serve(answer, client)

    assert ': keep-alive\n\nevent: delta\ndata: {"content":"ä\\n"}\n\nevent: done\ndata: {}\n\n' == client.text
    assert answer.closed
    assert not client.sent[-1]["more_body"]


async def test_a_hang_up_closes_the_answer():
    answer = Answer(Delta(text="a"), 60)

    await serve(answer, Client(leaves_after=0.05))

    assert answer.closed


async def test_a_hang_up_before_the_first_frame_closes_the_answer():
    """The client disconnects before the next event of a generation that has begun."""
    answer = Answer(Started(model="m"), 60, FINISHED)
    await wait_for_start(Client().request, answer.events)

    await serve(answer, Client(leaves_after=0))

    assert answer.closed


async def test_a_client_that_does_not_read_is_cut_off_without_a_traceback():
    answer, client = Answer(*[Delta(text="a")] * 100, FINISHED), Client(reads=False)

    with structlog.testing.capture_logs() as lines:
        await serve(answer, client, send_timeout_seconds=0.05)

    assert answer.closed
    assert ["warning"] == [line["log_level"] for line in lines]
    assert "exc_info" not in lines[0]


async def test_a_quiet_stream_is_kept_alive():
    answer, client = Answer(0.3, FINISHED), Client()

    await serve(answer, client, ping_seconds=0.05)

    assert client.text.count(": keep-alive\n\n") >= 3


@pytest.mark.parametrize(
    ("failure", "code"),
    [(EngineFailed("The engine died."), "service_unavailable"), (ValueError("private"), "internal_server_error")],
)
async def test_a_failure_is_the_last_frame(failure: Exception, code: str):
    answer, client = Answer(Delta(text="a"), failure), Client()

    with structlog.testing.capture_logs() as lines:
        await serve(answer, client)

    name, data = client.text.strip().split("\n\n")[-1].split("\n")
    assert "event: error" == name
    envelope = json.loads(data.removeprefix("data: "))
    assert (code, "r1") == (envelope["error"], envelope["request_id"])
    assert "private" not in client.text + str(lines)
    assert answer.closed


async def test_no_task_polls_for_a_shutdown():
    """The library's watcher wakes up twice a second and outlives the stream; ours must not start it."""
    before = asyncio.all_tasks()

    answer, client = Answer(0.1, FINISHED), Client()
    serving = asyncio.create_task(serve(answer, client))
    await asyncio.sleep(0.05)
    during = {getattr(task.get_coro(), "__name__", "") for task in asyncio.all_tasks()}
    await serving

    assert "_shutdown_watcher" not in during
    assert before == asyncio.all_tasks()


async def test_whole_answers_are_read_to_the_end_and_closed():
    answer = Answer(Started(model="m"), Delta(text="a"), Delta(text="b"), FINISHED)

    reply = await collect_response(Client().request, answer.events)

    assert "ab" == reply.text
    assert answer.closed


@pytest.mark.parametrize("read", [collect_response, wait_for_start])
async def test_nobody_waits_for_an_answer_that_nobody_reads(read: Callable[..., Any]):
    answer = Answer(60, FINISHED)

    with pytest.raises(ClientDisconnected):
        await read(Client(leaves_after=0.05).request, answer.events)

    assert answer.closed


@pytest.mark.parametrize("read", [collect_response, wait_for_start])
async def test_errors_before_the_answer_are_raised_as_they_are(read: Callable[..., Any]):
    error = EngineFailed("x")

    with pytest.raises(EngineFailed) as raised:
        await read(Client().request, Answer(error).events)

    assert error is raised.value


async def test_cancelling_the_route_cancels_its_work():
    answer = Answer(60)
    route = asyncio.create_task(collect_response(Client().request, answer.events))
    await asyncio.sleep(0.02)

    route.cancel()

    with pytest.raises(asyncio.CancelledError):
        await route
    assert answer.closed


async def test_work_that_is_done_wins_over_a_hang_up_at_the_same_moment():
    async def work() -> str:
        return "done"

    assert "done" == await cancel_on_disconnect(Client(leaves_after=0).request, work())


async def test_an_error_while_closing_reaches_nobody_with_its_message():
    class Stubborn(Answer):
        async def _play(self) -> AsyncGenerator[Event, None]:
            try:
                yield Delta(text="a")
                await asyncio.sleep(60)
            finally:
                raise ValueError("private")

    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    await serve(Stubborn(), Client(leaves_after=0.05))
    gc.collect()

    assert [] == failures
