"""Many requests at once on one model: all move together, and none is changed, stopped or held up by another."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from tests.e2e.conftest import Service, Start
from tests.e2e.test_conversation import events
from tests.waiting import HANG_SECONDS, wait_for

pytestmark = pytest.mark.e2e

CLIENTS = 32
TOKENS = 100


def body(number: int, tokens: int = TOKENS, **fields: Any) -> dict[str, Any]:
    """A request whose answer has exactly so many tokens and is like no other's."""
    prompt = f"{number} little mice went to the market and"
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache": False, **fields}


class Reader(threading.Thread):
    """Reads one stream, and keeps when its pieces came."""

    def __init__(self, service: Service, request: dict[str, Any]) -> None:
        super().__init__()
        self.moments: list[float] = []
        self.text = ""
        self.usage: dict[str, Any] = {}
        self.leaving = threading.Event()
        self._service = service
        self._request = {**request, "stream": True}

    def run(self) -> None:
        with self._service.client.stream("POST", "/v1/generate", json=self._request) as response:
            assert 200 == response.status_code, response.read()
            for name, data in events(response):
                self.moments.append(time.monotonic())
                if name == "delta":
                    self.text += data["content"]
                elif name == "done":
                    self.usage = data["usage"]
                if self.leaving.is_set():
                    return


def read_all(service: Service, requests: list[dict[str, Any]]) -> list[Reader]:
    readers = [Reader(service, request) for request in requests]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    return readers


def test_thirty_two_streams_move_together(service: Service) -> None:
    """All have begun before any has ended, and each is the completion of the same request sent by itself."""
    # Long enough that the last client of a busy machine has sent its request before the first answer ends.
    long = [body(n, tokens=8 * TOKENS) for n in range(CLIENTS)]
    single = [service.client.post("/v1/generate", json=long[n]).json()["generated_text"] for n in (0, 13, 31)]

    readers = read_all(service, long)

    assert [8 * TOKENS] * CLIENTS == [reader.usage["completion_tokens"] for reader in readers]
    assert single == [readers[n].text for n in (0, 13, 31)]
    assert max(reader.moments[0] for reader in readers) < min(reader.moments[-1] for reader in readers)


def test_a_client_that_leaves_takes_nothing_from_the_others(service: Service) -> None:
    """Its answer ends at once; the others are whole."""
    leaver, stayers = Reader(service, body(1, tokens=1500)), [Reader(service, body(n, tokens=300)) for n in range(2, 8)]
    for reader in (leaver, *stayers):
        reader.start()
    wait_for(lambda: len(leaver.moments) > 2)
    leaver.leaving.set()
    leaver.join(HANG_SECONDS)
    wait_for(lambda: service.engine()["running"] <= len(stayers))
    for reader in stayers:
        reader.join(60)

    assert [300] * 6 == [reader.usage["completion_tokens"] for reader in stayers]


def test_a_long_prompt_does_not_stall_a_stream(service: Service) -> None:
    """While a prompt of about 1,500 tokens is computed, the running stream goes on getting tokens."""
    stream = Reader(service, body(1, tokens=1500))
    stream.start()
    wait_for(lambda: len(stream.moments) > 20)
    before = time.monotonic()
    words = " ".join(str(n) for n in range(450))
    long = service.client.post("/v1/generate", json=body(0, tokens=1, prompt=words)).json()
    after = time.monotonic()
    stream.leaving.set()
    stream.join(HANG_SECONDS)

    assert 1400 < long["usage"]["prompt_tokens"] < 2000
    # In pieces of at most 512 tokens it takes three steps; alone in one step there would be none.
    assert 3 <= sum(before < moment < after for moment in stream.moments)


def test_the_next_turn_reports_what_did_not_have_to_be_computed_again(service: Service) -> None:
    """A session's second turn starts from the first; another key's same words would not."""
    first = service.chat("My name is Tovin.", session_id="reuse")
    second = service.chat("What is my name?", session_id="reuse")

    def cached(reply: dict[str, Any]) -> int:
        return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(first) < first["usage"]["prompt_tokens"]
    assert cached(second) >= first["usage"]["prompt_tokens"]
    assert "Tovin" in second["message"]["content"]


def logprobs(reply: dict[str, Any]) -> list[float]:
    return [token["logprob"] for each in reply["completions"] for token in each["tokens"]]


def test_three_answers_of_one_seed_are_the_same_three_again(service: Service) -> None:
    """With their log-probabilities, also while others are being answered; they differ among themselves."""
    request = {"prompt": "Once upon a time", "n": 3, "logprobs": True, "seed": 7, "max_tokens": 30, "cache": False}
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        stack.callback(pool.shutdown)
        others = [pool.submit(service.client.post, "/v1/generate", json=body(n)) for n in range(4)]
        first = service.client.post("/v1/generate", json=request).json()
        assert {200} == {other.result().status_code for other in others}
    again = service.client.post("/v1/generate", json=request).json()

    assert [each["text"] for each in first["completions"]] == [each["text"] for each in again["completions"]]
    # Sums in another order, in another company, differ in their last bits.
    assert logprobs(first) == pytest.approx(logprobs(again), abs=1e-4)
    assert 3 == len({each["text"] for each in first["completions"]})
    for each in first["completions"]:
        assert each["text"] == "".join(token["text"] for token in each["tokens"])
        assert all(token["logprob"] <= 0 for token in each["tokens"])


def test_a_full_line_is_refused_with_the_time_it_will_take(start: Start) -> None:
    """503 with a Retry-After; those who wait are served, one after the other."""
    small = start(MODEL__MAX_BATCH_SIZE="1", MODEL__MAX_WAITING="2")
    with ThreadPoolExecutor() as pool:
        replies = list(pool.map(lambda n: small.client.post("/v1/generate", json=body(n, tokens=100)), range(8)))

    refused = [reply for reply in replies if reply.status_code == 503]
    assert 3 <= sum(reply.status_code == 200 for reply in replies)
    assert refused
    assert all(1 <= int(reply.headers["Retry-After"]) <= 30 for reply in refused)
    assert 0 == small.stop()


def test_the_serial_runner_can_be_chosen(start: Start) -> None:
    """It answers alike; /status says which it is, and it refuses by name what it cannot do."""
    serial = start(MODEL__ENGINE="serial")

    assert "serial" == serial.get("/status").json()["model"]["engine"]
    assert "Paris" in serial.chat("What is the capital of France?")["message"]["content"]
    refused = serial.client.post("/v1/generate", json={**body(1), "presence_penalty": 0.5})
    assert 400 == refused.status_code
    assert "presence_penalty" in refused.json()["message"]
    serial.stop()
