"""The engine alone, without HTTP, beside a hand-written static batch loop of the same size in the same run.

`bench.serve` calls `compare`; both run as their own process, and one waits while the other works.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

from app.config import DeadlineConfig, ModelConfig
from app.engine.local import LocalEngine
from app.requests import GenerationRequest
from app.types import SamplingParams, Tenant
from bench.peers import Setup
from bench.process import ROOT
from bench.words import token_ids

PROMPT, NEW = 105, 64
BATCHES = (1, 8, 32)
PATIENCE = DeadlineConfig(waiting_seconds=3600, first_token_seconds=3600, total_seconds=3600)


@dataclass(frozen=True)
class Compared:
    """Tokens per second of both for one batch size, by round."""

    batch: int
    runner: str
    """Which runner of the engine was active: batching or serial."""
    engine: Sequence[float]
    loop: Sequence[float]

    @property
    def ratio(self) -> float:
        """Return the median of the rounds' own ratios: what slows a round down slows both."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.engine, self.loop, strict=True))

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "ratio": self.ratio}


class StaticLoop:
    """The process of `bench.static_batch`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def running(cls, setup: Setup) -> AsyncIterator["StaticLoop"]:
        """Start it, and end it with the block."""
        command = ("-m", "bench.static_batch", str(setup.model), setup.dtype, str(setup.threads))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, stdin=pipe, stdout=pipe)
        loop = cls(process)
        try:
            await loop._line()
            yield loop
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def seconds(self, batch: int, seed: int) -> float:
        """Return how long the loop takes for one batch."""
        job = {"batch": batch, "prompt": PROMPT, "new": NEW, "seed": seed}
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
        return float(await self._line())

    async def _line(self) -> str:
        line = await self._process.stdout.readline() if self._process.stdout is not None else b""
        if not line:
            raise RuntimeError("the static batch loop ended early")
        return line.decode().strip()


async def engine_seconds(engine: LocalEngine, batch: int, seed: int) -> float:
    """Return how long the engine takes for as many requests at once."""
    draw = random.Random(seed)
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    requests = [
        GenerationRequest(
            id=f"{batch}.{seed}.{number}",
            tenant=Tenant.owner("bench"),
            prompt_ids=token_ids(draw, PROMPT),
            sampling=params,
            cache=False,
        )
        for number in range(batch)
    ]

    async def drain(request: GenerationRequest) -> None:
        async for _ in engine.stream(request):
            pass

    began = time.perf_counter()
    await asyncio.gather(*map(drain, requests))
    return time.perf_counter() - began


async def compare(
    setup: Setup, rounds: int, report_progress: Callable[[str], None], batches: Sequence[int] = BATCHES
) -> list[Compared]:
    """Measure both in turns, after one round that does not count."""
    config = ModelConfig(name=str(setup.model), source="local", dtype=setup.dtype, threads=setup.threads)
    engine = LocalEngine(config, PATIENCE)
    await engine.start()
    try:
        await engine.wait_ready()
        async with StaticLoop.running(setup) as loop:
            return [await _compare_batch(engine, loop, batch, rounds, report_progress) for batch in batches]
    finally:
        await engine.close()


async def _compare_batch(
    engine: LocalEngine, loop: StaticLoop, batch: int, rounds: int, report_progress: Callable[[str], None]
) -> Compared:
    ours, theirs = [], []
    for number in range(rounds + 1):
        # Other prompts in each round, so that the engine finds nothing that it computed before.
        mine = await engine_seconds(engine, batch, seed=1000 * batch + number)
        other = await loop.seconds(batch, seed=1000 * batch + number)
        report_progress(f"engine alone, batch {batch}, round {number}: {mine:.2f} s, loop {other:.2f} s")
        ours.append(batch * NEW / mine)
        theirs.append(batch * NEW / other)
    return Compared(batch, engine.info.engine, ours[1:], theirs[1:])
