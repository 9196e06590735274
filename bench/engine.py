"""The engine alone, without HTTP, beside a hand-written static batch loop and OpenVINO GenAI in the same run.

`bench.serve` calls `compare`; all run as their own process, and the others wait while one works.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass

from app.config import DeadlineConfig, ModelConfig
from app.engine.local import LocalEngine
from app.requests import GenerationRequest
from app.types import SamplingParams, Tenant
from bench.peers import Setup, openvino_command, openvino_environment
from bench.process import ROOT
from bench.words import token_ids

PROMPT, NEW = 105, 64
BATCHES = (1, 8, 32)
PATIENCE = DeadlineConfig(waiting_seconds=3600, first_token_seconds=3600, total_seconds=3600)


@dataclass(frozen=True)
class Compared:
    """Tokens per second of each for one batch size, by round."""

    batch: int
    runner: str
    """Which runner of the engine was active: batching or serial."""
    engine: Sequence[float]
    loop: Sequence[float]
    openvino: Sequence[float] = ()
    """Empty where there is no OpenVINO GenAI."""

    @property
    def ratio(self) -> float:
        """Return the ratio to the loop."""
        return self._ratio(self.loop)

    def as_json(self) -> dict[str, object]:
        ratio = {"openvino_ratio": self._ratio(self.openvino)} if self.openvino else {}
        return {**asdict(self), "ratio": self.ratio, **ratio}

    def _ratio(self, other: Sequence[float]) -> float:
        """Return the median of the rounds' own ratios: what slows a round down slows both."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.engine, other, strict=True))


class JobProcess:
    """A process that takes batches on standard input and prints how long each takes, as `bench.static_batch` does."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def running(
        cls, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> AsyncIterator["JobProcess"]:
        """Start it, and end it with the block."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe)
        jobs = cls(process)
        try:
            await jobs._line()
            yield jobs
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def seconds(self, batch: int, seed: int) -> float:
        """Return how long one batch takes."""
        job = {"batch": batch, "prompt": PROMPT, "new": NEW, "seed": seed}
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
        return float(await self._line())

    async def _line(self) -> str:
        line = await self._process.stdout.readline() if self._process.stdout is not None else b""
        if not line:
            raise RuntimeError("a process that the engine is compared with ended early")
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
    """Measure all in turns, after one round that does not count."""
    config = ModelConfig(name=str(setup.model), source="local", dtype=setup.dtype, threads=setup.threads)
    engine = LocalEngine(config, PATIENCE)
    await engine.start()
    try:
        await engine.wait_ready()
        async with AsyncExitStack() as stack:
            command = (sys.executable, "-m", "bench.static_batch", str(setup.model), setup.dtype, str(setup.threads))
            others = {"loop": await stack.enter_async_context(JobProcess.running(command))}
            if setup.openvino is not None:
                openvino = JobProcess.running(openvino_command(setup), openvino_environment(setup))
                others["openvino"] = await stack.enter_async_context(openvino)
            return [await _compare_batch(engine, others, batch, rounds, report_progress) for batch in batches]
    finally:
        await engine.close()


async def _compare_batch(
    engine: LocalEngine,
    others: Mapping[str, JobProcess],
    batch: int,
    rounds: int,
    report_progress: Callable[[str], None],
) -> Compared:
    found: dict[str, list[float]] = {name: [] for name in ("engine", *others)}
    for number in range(rounds + 1):
        # Other prompts in each round, so that nobody finds what it computed before.
        seed = 1000 * batch + number
        seconds = {"engine": await engine_seconds(engine, batch, seed)}
        seconds |= {name: await other.seconds(batch, seed) for name, other in others.items()}
        shown = ", ".join(f"{name} {taken:.2f} s" for name, taken in seconds.items())
        report_progress(f"without HTTP, batch {batch}, round {number}: {shown}")
        for name, taken in seconds.items():
            found[name].append(batch * NEW / taken)
    return Compared(batch, engine.info.engine, **{name: each[1:] for name, each in found.items()})
