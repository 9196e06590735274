"""`python -m app bench`: how fast one's own model generates on this machine, in about a minute."""

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.cli.terminal import CONFIG, ConfigOption, JsonOption, existing, fail, show
from app.config import DeadlineConfig, ModelConfig, load_settings
from app.engine.local import LocalEngine
from app.errors import AppError, ConfigError
from app.events import Delta
from app.loading_display import show_loading
from app.requests import GenerationRequest
from app.telemetry import configure_logging
from app.types import SamplingParams, Tenant

SHAPES = ((1, 128), (8, 128), (32, 128), (1, 512))
"""Requests at once and tokens of each prompt."""
NEW_TOKENS = 64
MAX_ROUNDS = 5
SECONDS = 12.0
"""Of each shape, at most; a round that has begun is finished."""
_TOKENS = 256
"""Random prompts are made of the first tokens, which every model has."""


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of the rounds of one shape."""

    requests: int
    prompt_tokens: int
    tokens_per_second: float
    first_token_ms: float
    between_tokens_ms: float
    rounds: int


def bench(
    model: Annotated[str | None, typer.Argument(help="A folder or a hub id; by default the configured model.")] = None,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a model generates here, for 1, 8 and 32 requests at once and for a long prompt."""
    try:
        settings = load_settings(existing(config))
        given = {"name": model, "source": "auto"} if model else {}
        chosen = ModelConfig.model_validate(settings.model.model_dump() | {"spare_worker": False} | given)
        if chosen.engine in ("echo", "remote"):
            fail(f"the engine is {chosen.engine}, which computes no model here")
        token = settings.hub_token.get_secret_value() if settings.hub_token else None
        stop_logging = configure_logging(settings.logging)
        try:
            rows, title = asyncio.run(_measure(chosen, settings.deadlines, token))
        finally:
            stop_logging()
    except ConfigError as error:
        fail(str(error))
    except AppError as error:
        fail(error.message, 1)
    show([asdict(row) for row in rows], title=title, as_json=as_json)


async def _measure(config: ModelConfig, deadlines: DeadlineConfig, hub_token: str | None) -> tuple[list[Row], str]:
    """Load the model in a process of its own and time every shape that fits its context window.

    Returns: the rows, and in words what was measured.
    """
    engine = LocalEngine(config, deadlines.times(100), hub_token=hub_token)
    await engine.start()
    loading = asyncio.create_task(show_loading(config, lambda: engine.status().progress, sys.stderr))
    try:
        await engine.wait_ready()
        await loading
        await _round(engine, 1, 16, seed=0)  # what only the first request of a process pays
        fitting = [shape for shape in SHAPES if shape[1] + NEW_TOKENS <= engine.info.context_length]
        rows = await _rows(engine, fitting)
        info = engine.info
    finally:
        loading.cancel()
        await engine.close()
    what = ", ".join(part for part in (config.public_name, info.dtype, info.device, info.engine) if part)
    return rows, f"{what}: {NEW_TOKENS} tokens for each request"


async def _rows(engine: LocalEngine, shapes: Sequence[tuple[int, int]]) -> list[Row]:
    """Time the shapes, and show on a terminal which one is being timed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = list[Row]()
    console = Console(stderr=True)
    # Lines of the log stay as they are, where rich would break them.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        for requests, prompt_tokens in shapes:
            at_once = f"{requests} requests at once" if requests > 1 else "1 request"
            task = bar.add_task(f"measuring {at_once}, {prompt_tokens} tokens each", total=MAX_ROUNDS)
            rows.append(await _row(engine, requests, prompt_tokens, on_round=partial(bar.advance, task)))
            bar.update(task, visible=False)
    return rows


async def _row(engine: LocalEngine, requests: int, prompt_tokens: int, *, on_round: Callable[[], object]) -> Row:
    """Args: on_round: is called after each round."""
    rounds, began = list[tuple[float, list[float]]](), time.perf_counter()
    while len(rounds) < MAX_ROUNDS and (not rounds or time.perf_counter() - began < SECONDS):
        rounds.append(await _round(engine, requests, prompt_tokens, seed=1 + len(rounds)))
        on_round()
    seconds = statistics.median(seconds for seconds, _ in rounds)
    first = statistics.median(each for _, firsts in rounds for each in firsts)
    return Row(
        requests=requests,
        prompt_tokens=prompt_tokens,
        tokens_per_second=round(requests * NEW_TOKENS / seconds, 1),
        first_token_ms=round(first * 1000, 1),
        between_tokens_ms=round((seconds - first) * 1000 / (NEW_TOKENS - 1), 1),
        rounds=len(rounds),
    )


async def _round(engine: LocalEngine, requests: int, prompt_tokens: int, *, seed: int) -> tuple[float, list[float]]:
    """Send requests at once.  Returns: seconds until all are answered, and until each one's first token."""
    draw = random.Random(f"{requests}.{prompt_tokens}.{seed}")  # noqa: S311  # reproducible prompts, none like another
    tokens = min(engine.info.vocab_size or _TOKENS, _TOKENS)

    async def time_one(number: int) -> float:
        request = GenerationRequest(
            id=f"bench-{requests}-{prompt_tokens}-{seed}-{number}",
            tenant=Tenant.program(),
            prompt_ids=tuple(draw.randrange(tokens) for _ in range(prompt_tokens)),
            sampling=SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True),
            cache=False,
        )
        first = 0.0
        async for event in engine.stream(request):
            if isinstance(event, Delta) and event.tokens and not first:
                first = time.perf_counter() - began
        return first

    began = time.perf_counter()
    firsts = await asyncio.gather(*map(time_one, range(requests)))
    return time.perf_counter() - began, firsts
