"""The loads that every server gets: how many clients, how long the prompts and completions.

A load is drawn from a seed, so that each server of a round gets the same requests, and no two requests are alike.
"""

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.peers import Message, Peer, Setup
from bench.wire import RequestFailed, TimedResponse, send
from bench.words import text

Size = tuple[int, int]
"""Tokens of a prompt and of its completion."""


@dataclass(frozen=True)
class Load:
    """So many clients, each sending its next request when the last is complete."""

    name: str
    title: str
    clients: int
    per_client: int
    """Requests of each client, on average; or conversations, one after the other."""
    sizes: Sequence[Size]
    """Taken in turns, in a drawn order."""
    turns: int = 0
    """Above 0 each is a conversation of so many requests instead."""

    def shortened(self) -> "Load":
        """Return the same with one request of each client, or one conversation of three turns."""
        return replace(self, per_client=1, turns=min(self.turns, 3))

    def sizes_drawn(self, draw: random.Random) -> list[Size]:
        """Return the sizes of all requests of one round."""
        count = self.clients * self.per_client
        sizes = [self.sizes[number % len(self.sizes)] for number in range(count)]
        draw.shuffle(sizes)
        return sizes


SHORT, LONG = (105, 64), (512, 64)
MIXED = ((16, 96), (105, 64), (105, 32), (512, 64))
TURN = (64, 64)
LOADS = (
    Load("c1", "1 client", 1, 4, [SHORT]),
    Load("c8", "8 clients", 8, 4, [SHORT]),
    Load("c32", "32 clients", 32, 2, [SHORT]),
    Load("long", "long prompts, 8 clients", 8, 2, [LONG]),
    Load("mixed", "mixed sizes, 8 clients", 8, 3, MIXED),
    Load("chat", "conversation of ten turns", 1, 3, [TURN], turns=10),
)
WARM_UP = Load("warm-up", "warm-up", 2, 2, [(105, 8)])


async def run_load(load: Load, peer: Peer, setup: Setup, port: int, seed: str) -> list[TimedResponse]:
    """Run a load against a server and return the responses, those of conversations in order.

    Raises: RequestFailed: a request failed, or its completion was not as long as requested.
    """
    draw = random.Random(seed)
    if load.turns:
        conversations = [await _converse(load, peer, setup, port, f"{seed}.{n}") for n in range(load.per_client)]
        return [response for responses in conversations for response in responses]
    waiting = deque((text(draw, size), size, max_tokens) for size, max_tokens in load.sizes_drawn(draw))
    responses: list[TimedResponse] = []

    async def client() -> None:
        while waiting:
            prompt, prompt_tokens, max_tokens = waiting.popleft()
            response = await send(port, peer.completion(setup, prompt, max_tokens), peer.parse)
            _check(response, max_tokens, prompt_tokens)
            responses.append(response)

    await asyncio.gather(*(client() for _ in range(load.clients)))
    return responses


async def _converse(load: Load, peer: Peer, setup: Setup, port: int, seed: str) -> list[TimedResponse]:
    draw = random.Random(seed)
    session = f"{seed.replace('/', '.')}.{draw.getrandbits(32)}"
    (words, max_tokens), turns, responses = load.sizes[0], list[Message](), list[TimedResponse]()
    for _ in range(load.turns):
        turns.append({"role": "user", "content": text(draw, words).strip()})
        response = await send(port, peer.chat(setup, session, turns, max_tokens), peer.parse)
        _check(response, max_tokens)
        turns.append({"role": "assistant", "content": response.text})
        responses.append(response)
    return responses


def _check(response: TimedResponse, completion_tokens: int, prompt_tokens: int | None = None) -> None:
    """Compare the token counts: a server that does less work would win.  Raises: RequestFailed: it did less."""
    if response.completion_tokens != completion_tokens:
        raise RequestFailed(f"{response.completion_tokens} tokens generated where {completion_tokens} were requested")
    if prompt_tokens is not None and response.prompt_tokens != prompt_tokens:
        raise RequestFailed(f"a prompt of {prompt_tokens} tokens was read as {response.prompt_tokens}")
