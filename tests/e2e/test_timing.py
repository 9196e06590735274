"""Whether the time of a request says what another key has sent: its own earlier prompts show, another key's do not.

Prompts come in rounds, one of each kind in random order, so that whatever else the machine does falls on all of them.
Compared are ranks: the share of pairs in which a prompt of one kind took longer than one of the other is 1/2 for kinds
that cannot be told from each other, whatever the unit of time is.
"""

import math
import random
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import httpx
import pytest

from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from app.types import Message, Role, Tenant
from tests.e2e.conftest import ROOT, Service
from tests.waiting import happens

pytestmark = pytest.mark.e2e

KINDS = ("own", "another's", "fresh")
VICTIM, PROBER = Tenant.key("victim"), Tenant.key("prober")
Send = Callable[[str], object]
"""Sends a prompt, which is not one of before unless the text is."""

LONG = pytest.param(True, marks=[pytest.mark.soak, pytest.mark.timeout(900)])
both_lengths = pytest.mark.parametrize("long", [False, LONG], ids=["short", "long"])


def measure(
    rounds: int, words: int, victim: Send, prober: Send, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return how many seconds the prober's request took whose prompt the prober, the victim or nobody had sent."""
    rng = random.Random(7)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def text() -> str:
        return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9))) for _ in range(words))

    for number in range(rounds + 1):
        for kind in rng.sample(KINDS, len(KINDS)):
            prompt, other = text(), text()
            victim(prompt if kind == "another's" else other)
            prober(prompt if kind == "own" else other[::-1])
            victim(text())
            began = clock()
            prober("".join(prompt))
            if number:  # the first round warms up
                seconds[kind].append(clock() - began)
    return seconds


def longer(mine: list[float], other: list[float]) -> float:
    """Return the share of pairs in which mine is the longer one."""
    return sum((a > b) + (a == b) / 2 for a, b in product(mine, other)) / (len(mine) * len(other))


def chance(rounds: int) -> float:
    """Return how far from 1/2 that share may be: four standard deviations of Mann and Whitney's statistic, or a tenth.

    Processor caches favour what was computed a moment ago by a few hundredths, wherever the time is taken so closely.
    """
    return max(0.1, 4 * math.sqrt((2 * rounds + 1) / (12 * rounds * rounds)))


@both_lengths
def test_the_time_of_encoding_says_nothing_of_anothers_conversation(long: bool) -> None:
    rounds = 400 if long else 50
    tokenizer = HfTokenizer(ROOT / "models" / "tiny-chat")

    def sending(tenant: Tenant) -> Send:
        return lambda text: tokenizer.encode_chat([Message(Role.USER, text)], tenant=tenant)

    def shows_own_only() -> bool:
        # Of this thread, which encodes: what the machine does beside it takes none.
        seconds = measure(rounds, 300, sending(VICTIM), sending(PROBER), time.thread_time)
        own, others = longer(seconds["fresh"], seconds["own"]), longer(seconds["fresh"], seconds["another's"])
        return own > 0.8 and abs(others - 0.5) < chance(rounds)

    assert happens(shows_own_only, times=3)


@contextmanager
def key_of(service: Service, owner: str, max_tokens: int) -> Iterator[Send]:
    """Return how a key of its own sends a chat for one token, or for more than the context window holds."""
    key = service.client.post("/v1/keys", json={"owner": owner}).json()["key"]
    status = 200 if max_tokens == 1 else 400
    with httpx.Client(base_url=service.url, headers={"X-API-Key": key}, timeout=60) as client:

        def send(text: str) -> None:
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "cache": False}
            assert status == client.post("/v1/chat", json=body).status_code

        yield send


@both_lengths
@pytest.mark.parametrize("max_tokens", [1, 100_000], ids=["answered", "refused"])
def test_the_time_of_an_answer_says_nothing_of_anothers_prompt(service: Service, long: bool, max_tokens: int) -> None:
    """Neither of one that the model computes nor of one that is refused once its prompt has been encoded."""
    rounds = 50 if long else 16
    with key_of(service, "victim", max_tokens) as victim, key_of(service, "prober", max_tokens) as prober:

        def shows_own_only() -> bool:
            seconds = measure(rounds, 100, victim, prober)
            own, others = longer(seconds["fresh"], seconds["own"]), longer(seconds["fresh"], seconds["another's"])
            return (max_tokens > 1 or own > 0.8) and abs(others - 0.5) < chance(rounds)

        assert happens(shows_own_only, times=3)
