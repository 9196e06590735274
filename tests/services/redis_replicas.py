"""Replicas as processes of their own, each with a store of sessions, which may be killed and suspended."""

import asyncio
import itertools
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from app.config import ChatHistoryConfig
from app.errors import SessionTakenOver
from app.generation.sessions import Turn
from app.stores.encryption import Encryption
from app.stores.redis_connection import RedisConnection
from app.stores.redis_sessions import RedisSessionStore
from app.types import Message, Role, Tenant
from tests.services.redis_race import patient

ANN = Tenant.owner("ann")
LEASE_SECONDS = 0.5
PREFIX = "replicas"


def store_of(connection: RedisConnection, *keys: bytes) -> RedisSessionStore:
    config = ChatHistoryConfig(max_turns=10_000, max_bytes=10_000_000)
    return RedisSessionStore(connection, config, Encryption(keys), lease_seconds=LEASE_SECONDS)


def turn(word: str) -> Turn:
    return Turn((Message(Role.USER, word), Message(Role.ASSISTANT, f"re {word}")))


def take_turns(url: str, pipe: Connection, first: int) -> None:
    """Take one turn after another, and say so after each; runs until it is killed."""

    async def run() -> None:
        store = store_of(RedisConnection(patient(url, key_prefix=PREFIX)))
        for number in itertools.count(first):
            async with store.turn(ANN, "s"):
                await store.read(ANN, "s")
                await asyncio.sleep(0.003)
                await store.append(ANN, "s", *(turn(f"{number}{part}") for part in "ab"))
            pipe.send(number)

    asyncio.run(run())


def take_one_turn(url: str, pipe: Connection) -> None:
    """Begin a turn, wait until told to go on, and say what became of it."""

    async def run() -> None:
        store = store_of(RedisConnection(patient(url, key_prefix=PREFIX)))
        try:
            async with store.turn(ANN, "s"):
                pipe.send("begun")
                await asyncio.to_thread(pipe.recv)
                await store.append(ANN, "s", turn("late"))
            pipe.send("stored")
        except SessionTakenOver:
            pipe.send("taken over")

    asyncio.run(run())


class Replicas:
    """Processes that each have a store."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._started: list[BaseProcess] = []

    def start(self, target: Any, *arguments: Any) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(arguments[0], theirs, *arguments[1:]), daemon=True)
        process.start()
        theirs.close()
        self._started.append(process)
        return process, ours

    def kill(self) -> None:
        for process in self._started:
            process.kill()
            process.join(10)
