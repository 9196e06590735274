"""Streams and whole answers: every way out closes the generator."""

import asyncio
import gc
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import structlog
from starlette.requests import Request
from starlette.types import Message

from app.errors import AppError, ClientDisconnected, EngineFailed
from app.events import Delta, Event, Finished, FinishedSample, Started
from app.types import FinishReason, Usage
from app.web.http.errors import envelope
from app.web.http.sse import (
    READ_AHEAD,
    EventStream,
    FrameStream,
    StreamEncoder,
    cancel_on_disconnect,
    collect_response,
    frame,
)
from tests.waiting import HANG_SECONDS

SAMPLE = FinishedSample(finish_reason=FinishReason.STOP, completion_tokens=1)
FINISHED = Finished(model="m", samples=(SAMPLE,), usage=Usage(1, 1))


class Generation:
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
        self.sent: list[Message] = []

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(self.leaves_after)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if not self.reads and len(self.sent) > 2:
            await asyncio.sleep(60)

    @property
    def request(self) -> Request:
        return Request({"type": "http", "headers": []}, self.receive)

    @property
    def bodies(self) -> list[bytes]:
        """The content of each message but the last one, which is empty."""
        *bodies, last = [message["body"] for message in self.sent if message["type"] == "http.response.body"]
        assert not last
        return bodies

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


class OrderedEncoder(PlainEncoder):
    """Fails for an event that comes before Started, as an encoder with a state for each choice does."""

    def __init__(self) -> None:
        self.started = False

    def encode(self, event: Event) -> bytes:
        self.started = self.started or isinstance(event, Started)
        if not self.started:
            raise KeyError("an event of a stream that has not begun")
        return frame({}, "started") if isinstance(event, Started) else super().encode(event)


async def serve(
    generation: Generation, client: Client, *, encoder: StreamEncoder | None = None, **options: Any
) -> None:
    """Stream the events of a generation that has begun."""
    generation.steps = (Started(model="m"), *generation.steps)
    await send_stream(generation, client, encoder=encoder, **options)


async def send_stream(
    generation: Generation, client: Client, *, encoder: StreamEncoder | None = None, **options: Any
) -> None:
    stream = EventStream(generation.events, encoder or PlainEncoder(), **options)
    async with asyncio.timeout(HANG_SECONDS):
        await stream({"type": "http", "method": "POST"}, client.receive, client.send)


async def test_a_whole_stream_is_sent_and_closed():
    generation, client = Generation(Delta(text="ä\n"), FINISHED), Client()

    await serve(generation, client)

    assert ': keep-alive\n\nevent: delta\ndata: {"content":"ä\\n"}\n\nevent: done\ndata: {}\n\n' == client.text
    assert generation.closed
    assert not client.sent[-1]["more_body"]


async def test_frames_that_are_ready_at_once_leave_in_one_message():
    """Others leave as soon as they are ready; the bytes are the same."""
    deltas = [Delta(text=str(number)) for number in range(4)]
    at_once, one_by_one = Client(), Client()

    await serve(Generation(*deltas, FINISHED), at_once)
    await serve(Generation(*[step for delta in deltas for step in (delta, 0.02)], FINISHED), one_by_one)

    assert at_once.text == one_by_one.text
    assert len(at_once.bodies) <= 2
    assert len(deltas) <= len(one_by_one.bodies)


async def test_a_client_that_reads_slowly_gets_every_frame_in_its_order():
    """More than fit into the buffer, so that the generation has to wait for the client."""

    class Slow(Client):
        async def send(self, message: Message) -> None:
            await asyncio.sleep(0.002)
            await super().send(message)

    numbers = [str(number) for number in range(5 * READ_AHEAD)]
    generation, client = Generation(*[Delta(text=number) for number in numbers], FINISHED), Slow()

    await serve(generation, client)

    contents = [json.loads(line[6:])["content"] for line in client.text.split("\n") if line.startswith('data: {"c')]
    assert numbers == contents
    assert len(client.bodies) >= len(numbers) / (READ_AHEAD + 1)
    assert generation.closed


async def test_the_opening_is_encoded_before_every_other_event():
    """Also where the generation has all of them ready."""
    client = Client()

    await serve(Generation(Delta(text="a"), FINISHED), client, encoder=OrderedEncoder())

    names = [line.removeprefix("event: ") for line in client.text.split("\n") if line.startswith("event: ")]
    assert ["started", "delta", "done"] == names


async def test_a_hang_up_closes_the_answer():
    generation = Generation(Delta(text="a"), 60)

    await serve(generation, Client(leaves_after=0.05))

    assert generation.closed


async def test_a_hang_up_before_the_first_frame_closes_the_answer():
    """The client disconnects before the next event of a generation that has begun."""
    generation = Generation(60, FINISHED)

    await serve(generation, Client(leaves_after=0.02))

    assert generation.closed


async def test_nothing_is_sent_to_a_client_that_hangs_up_before_its_answer_begins():
    generation, client = Generation(60, Started(model="m"), FINISHED), Client(leaves_after=0.05)

    with pytest.raises(ClientDisconnected):
        await send_stream(generation, client)

    assert generation.closed
    assert [] == client.sent


async def test_an_error_before_the_answer_is_raised_as_it_is_and_nothing_is_sent():
    """So that it gets an ordinary response, with its own status; the caller is charged with it."""
    error, refused = EngineFailed("x"), list[AppError]()
    client = Client()

    with pytest.raises(EngineFailed) as raised:
        await send_stream(Generation(error), client, on_error=refused.append)

    assert error is raised.value
    assert [error] == refused
    assert [] == client.sent


async def test_no_comment_keeps_a_connection_open_before_the_answer_begins():
    """It would be a response with status 200, and a refusal could not be one any more."""
    client = Client()

    with pytest.raises(EngineFailed):
        await send_stream(Generation(0.1, EngineFailed("x")), client, ping_seconds=0.02)

    assert [] == client.sent


async def test_the_response_and_a_first_token_that_comes_with_its_start_leave_without_a_pause():
    """Between them the loop takes no turn in which something else could hold them up."""
    turns = list[tuple[str, int]]()

    class Timed(Client):
        async def send(self, message: Message) -> None:
            turns.append((message["type"], turn))
            await super().send(message)

    turn = 0

    async def count() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    counting = asyncio.create_task(count())
    client = Timed()
    await serve(Generation(Delta(text="a"), 0.05, FINISHED), client)
    counting.cancel()

    (start, begun), (body, sent), *_ = turns
    assert ("http.response.start", "http.response.body") == (start, body)
    assert begun == sent
    assert '"content":"a"' in client.bodies[0].decode()


async def test_frames_of_other_work_are_sent_until_it_ends():
    async def frames() -> AsyncGenerator[bytes, None]:
        for number in range(3):
            yield frame({"done": number}, "progress")

    client = Client()
    async with asyncio.timeout(HANG_SECONDS):
        await FrameStream(frames())({"type": "http", "method": "POST"}, client.receive, client.send)

    assert ": keep-alive" == client.text.split("\n\n")[0]
    assert 3 == client.text.count("event: progress")


async def test_frames_of_other_work_end_with_their_client():
    closed = asyncio.Event()

    async def frames() -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.sleep(60)
            yield b""
        finally:
            closed.set()

    client = Client(leaves_after=0.02)
    async with asyncio.timeout(HANG_SECONDS):
        await FrameStream(frames())({"type": "http", "method": "POST"}, client.receive, client.send)

    assert closed.is_set()
    assert 200 == client.sent[0]["status"]


async def test_a_client_that_does_not_read_is_cut_off_without_a_traceback():
    generation, client = Generation(*[Delta(text="a")] * 100, FINISHED), Client(reads=False)

    with structlog.testing.capture_logs() as lines:
        await serve(generation, client, send_timeout_seconds=0.05)

    assert generation.closed
    assert ["warning"] == [line["log_level"] for line in lines]
    assert "exc_info" not in lines[0]


async def test_a_quiet_stream_is_kept_alive():
    generation, client = Generation(0.3, FINISHED), Client()

    await serve(generation, client, ping_seconds=0.05)

    assert client.text.count(": keep-alive\n\n") >= 3


@pytest.mark.parametrize(
    ("failure", "code"),
    [(EngineFailed("The engine died."), "service_unavailable"), (ValueError("private"), "internal_server_error")],
)
async def test_a_failure_is_the_last_frame(failure: Exception, code: str):
    generation, client = Generation(Delta(text="a"), failure), Client()

    with structlog.testing.capture_logs() as lines:
        await serve(generation, client)

    name, data = client.text.strip().split("\n\n")[-1].split("\n")
    assert "event: error" == name
    envelope = json.loads(data.removeprefix("data: "))
    assert (code, "r1") == (envelope["error"], envelope["request_id"])
    assert "private" not in client.text + str(lines)
    assert generation.closed


async def test_no_task_outlives_its_stream():
    before = asyncio.all_tasks()

    await serve(Generation(0.1, FINISHED), Client())

    assert before == asyncio.all_tasks()


async def test_whole_answers_are_read_to_the_end_and_closed():
    generation = Generation(Started(model="m"), Delta(text="a"), Delta(text="b"), FINISHED)

    reply = await collect_response(Client().request, generation.events)

    assert "ab" == reply.text
    assert generation.closed


async def test_nobody_waits_for_an_answer_that_nobody_reads():
    generation = Generation(60, FINISHED)

    with pytest.raises(ClientDisconnected):
        await collect_response(Client(leaves_after=0.05).request, generation.events)

    assert generation.closed


async def test_errors_of_a_whole_answer_are_raised_as_they_are():
    error = EngineFailed("x")

    with pytest.raises(EngineFailed) as raised:
        await collect_response(Client().request, Generation(error).events)

    assert error is raised.value


async def test_cancelling_the_route_cancels_its_work():
    generation = Generation(60)
    route = asyncio.create_task(collect_response(Client().request, generation.events))
    await asyncio.sleep(0.02)

    route.cancel()

    with pytest.raises(asyncio.CancelledError):
        await route
    assert generation.closed


async def test_a_second_cancellation_does_not_interrupt_what_the_work_frees():
    begun, cleaning, freed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await asyncio.sleep(0.01)
            freed.set()

    route = asyncio.create_task(cancel_on_disconnect(Client().request, work()))
    for moment in (begun, cleaning):
        await moment.wait()
        route.cancel()
    with pytest.raises(asyncio.CancelledError):
        await route
    async with asyncio.timeout(HANG_SECONDS):
        await freed.wait()


async def test_work_that_is_done_wins_over_a_hang_up_at_the_same_moment():
    async def work() -> str:
        return "done"

    assert "done" == await cancel_on_disconnect(Client(leaves_after=0).request, work())


async def test_an_error_while_closing_reaches_nobody_with_its_message():
    class Stubborn(Generation):
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
