"""Measure what the service costs in front of another server, beside LiteLLM's proxy in the same run.

    python -m bench.remote [--rounds 3] [--vllm FOLDER] [--litellm FOLDER] [--shared] [--unfiltered]

The upstream serves a Llama (`bench.model`); it is another instance of this service, without its filters, or vLLM.  It
is asked for streams of chats by itself, through this service with default settings (limits, filters of personal data,
logs), with --unfiltered through one without filters, too, and through LiteLLM, in turns, one asleep while the other is
measured.  Each ratio is the median over the rounds.  Prompts are counted by the model's tokenizer here or, with --count
server, by the upstream's route /tokenize.

The upstream has the first half of the processors for itself, and the clients share the other half with whatever stands
in front, as they do where the upstream is another machine.  With --shared all share all processors: what stands in
front then takes its time from the model.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, overhead
from bench.peers import DEADLINES, Ours, Peer, Setup, Vllm
from bench.process import KEY, ROOT, Server, free_port, our_command, our_environment, serving, stop_on_sigterm
from bench.wire import Post, TimedResponse, send
from bench.words import text

MODEL = ROOT / ".cache" / "bench" / "llama-135m"
NAME = "model"
"""What clients call the model in front."""
PROMPT_WORDS = 105
SINGLE_GROUPS, SINGLE_REQUESTS, SINGLE_TOKENS = 3, 4, 8
"""One after the other, for the time to the first token: so many times so many requests of each target, in turns."""
READY_SECONDS = 900.0


@dataclass(frozen=True)
class Target:
    """What is asked: the upstream itself, or something in front of it."""

    title: str
    server: Server
    model: str
    parse: Peer

    def post(self, prompt: str, max_tokens: int) -> Post:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        return Post("/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})


@dataclass(frozen=True)
class Figures:
    """What one round showed of one target."""

    tokens_per_second: float
    first_ms: float
    """Median time to the first text of one client alone, if only a blank."""
    word_ms: float
    """Median time to its first word: a filter keeps a word until it knows what follows, which the next token shows."""
    cpu_ms: float
    """Processor time of what stands in front, or of the upstream itself, for each token with all clients."""


async def measure(
    targets: Sequence[Target], upstream: Target, clients: int, tokens: int, seed: str
) -> Mapping[Target, Figures]:
    """Ask each target for one answer after the other, then for many at once; no two prompts of a run are alike."""
    draws = {target: random.Random(f"{target.title} {seed}") for target in targets}
    single: dict[Target, list[TimedResponse]] = {target: [] for target in targets}
    for _ in range(SINGLE_GROUPS):
        for target in targets:
            with awake(target, upstream):
                single[target] += [
                    await send_chat(target, draws[target], SINGLE_TOKENS) for _ in range(SINGLE_REQUESTS)
                ]
    found = {}
    for target in targets:
        with awake(target, upstream):
            began, busy = time.perf_counter(), target.server.cpu_seconds()
            answers = await asyncio.gather(*(send_chat(target, draws[target], tokens) for _ in range(clients)))
            lasted, busy = time.perf_counter() - began, target.server.cpu_seconds() - busy
        generated = sum(each.completion_tokens for each in answers)
        found[target] = Figures(
            generated / lasted,
            1000 * statistics.median(each.first_token for each in single[target]),
            1000 * statistics.median(each.first_word for each in single[target]),
            1000 * busy / generated,
        )
        print(f"{target.title}: {found[target]}", file=sys.stderr, flush=True)
    return found


@contextmanager
def awake(target: Target, upstream: Target) -> Iterator[None]:
    """Let what stands in front run while the block does; the upstream always does."""
    if target is upstream:
        yield
        return
    target.server.resume()
    try:
        yield
    finally:
        target.server.pause()


async def send_chat(target: Target, draw: random.Random, tokens: int) -> TimedResponse:
    """Return one answer.  Raises: RuntimeError: it is not as long as requested."""
    prompt = text(draw, PROMPT_WORDS)
    answer = await send(target.server.port, target.post(prompt, tokens), target.parse.parse)
    if answer.completion_tokens != tokens:
        raise RuntimeError(f"{target.title}: {answer.completion_tokens} tokens where {tokens} were requested")
    return answer


async def compare(targets: Sequence[Target], clients: int, tokens: int, rounds: int) -> Mapping[Target, list[Figures]]:
    """Measure the targets in turns, each first in another round; the first of them is awake all the time."""
    upstream, *fronts = targets
    found: dict[Target, list[Figures]] = {target: [] for target in targets}
    for target in targets:
        draw = random.Random(f"{target.title} warm-up")
        await asyncio.gather(*(send_chat(target, draw, SINGLE_TOKENS) for _ in range(clients)))
    for front in fronts:
        front.server.pause()
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        turn = number % len(targets)
        figures = await measure([*targets[turn:], *targets[:turn]], upstream, clients, tokens, str(number))
        for target in targets:
            found[target].append(figures[target])
    return found


@contextmanager
def upstream_server(setup: Setup) -> Iterator[Target]:
    """Run the server that has the model."""
    peer: Peer = Vllm() if setup.vllm else Ours()
    port, log = free_port(), setup.folder / "upstream.log"
    # It filters nothing, as most servers do: what that costs is to be seen in front.
    command, environment = peer.command(setup, port), {**peer.environment(setup), "PII__ENABLED": "false"}
    if setup.vllm:
        command += ["--api-key", KEY]
    with serving(command, port, environment, peer.ready, log, READY_SECONDS) as server:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {KEY}"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310  # a fixed scheme and host
            model = json.load(reply)["data"][0]["id"]
        yield Target("vLLM itself" if setup.vllm else "another instance itself", server, model, Vllm())


@contextmanager
def our_front(folder: Path, upstream: Target, tokenizer: str, *, filtered: bool) -> Iterator[Target]:
    """Run this service in front of it."""
    name = "front" if filtered else "unfiltered"
    port, data = free_port(), folder / name
    data.mkdir()
    settings = {
        **overhead.SETTINGS,
        **DEADLINES,
        "MODEL__ENGINE": "remote",
        "MODEL__NAME": NAME,
        "REMOTE__BASE_URLS": json.dumps([f"http://127.0.0.1:{upstream.server.port}/v1"]),
        "REMOTE__API_KEY": KEY,
        "REMOTE__TOKENIZER": tokenizer,
        "PII__ENABLED": str(filtered).lower(),
    }
    environment, log = our_environment(data, settings), folder / f"{name}.log"
    with serving(our_command(port), port, environment, "/readyz", log, READY_SECONDS) as server:
        yield Target(f"through this service{'' if filtered else ', unfiltered'}", server, NAME, Vllm())


@contextmanager
def litellm_front(folder: Path, installation: Path, upstream: Target) -> Iterator[Target]:
    """Run LiteLLM's proxy in front of it."""
    port, config = free_port(), folder / "litellm.yaml"
    params = {
        "model": f"hosted_vllm/{upstream.model}",
        "api_base": f"http://127.0.0.1:{upstream.server.port}/v1",
        "api_key": KEY,
    }
    # JSON is YAML, too.
    entry = {"model_name": NAME, "litellm_params": params}
    config.write_text(json.dumps({"model_list": [entry], "general_settings": {"master_key": KEY}}))
    command = [str(installation / "bin" / "litellm"), "--config", str(config), "--port", str(port)]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "NO_PROXY": "127.0.0.1"}
    with serving(
        [*command, "--host", "127.0.0.1"],
        port,
        inherited | offline,
        "/health/liveliness",
        folder / "litellm.log",
        READY_SECONDS,
    ) as server:
        yield Target("through LiteLLM's proxy", server, NAME, Vllm())


def as_markdown(found: Mapping[Target, list[Figures]]) -> str:
    """Return the table of medians: rates, their ratios to the upstream's, and what is added to the first token."""
    lines = [
        "| asked | tokens/s | of the upstream's own | range | first text ms | added | first word ms | added "
        "| CPU ms a token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    own = next(iter(found.values()))
    for target, rounds in found.items():
        ratios = [each.tokens_per_second / its.tokens_per_second for each, its in zip(rounds, own, strict=True)]
        firsts = [each.first_ms - its.first_ms for each, its in zip(rounds, own, strict=True)]
        words = [each.word_ms - its.word_ms for each, its in zip(rounds, own, strict=True)]
        cells = [
            target.title,
            f"{statistics.median(each.tokens_per_second for each in rounds):.0f}",
            f"**{statistics.median(ratios):.2f}**",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{statistics.median(each.first_ms for each in rounds):.1f}",
            f"{statistics.median(firsts):+.1f}",
            f"{statistics.median(each.word_ms for each in rounds):.1f}",
            f"{statistics.median(words):+.1f}",
            f"{statistics.median(each.cpu_ms for each in rounds):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _folder(given: str) -> Path:
    """Return a folder that is found from everywhere."""
    return Path(given).resolve()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--shape", default="135m", help="of the model, as `bench.model` has them")
    parser.add_argument("--vllm", type=_folder, help="a virtual environment with vLLM, which is then the upstream")
    parser.add_argument("--litellm", type=_folder, help="a virtual environment with litellm[proxy]")
    parser.add_argument("--count", choices=["here", "server"], default="here", help="where prompts are counted")
    parser.add_argument("--shared", action="store_true", help="let all share all processors")
    parser.add_argument("--unfiltered", action="store_true", help="measure the service without filters, too")
    arguments = parser.parse_args()
    stop_on_sigterm()
    cpus = sorted(os.sched_getaffinity(0))
    half = cpus if arguments.shared or len(cpus) < 2 else cpus[: len(cpus) // 2]
    model = MODEL.with_name(f"llama-{arguments.shape}")
    dtype: Any = subprocess.run(
        [sys.executable, "-m", "bench.model", str(model), "--shape", arguments.shape],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[-1]
    print(machine.describe() + "\n", flush=True)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        setup = Setup(model, dtype, len(half), folder, system="", vllm=arguments.vllm)
        # Whatever is started next inherits it.
        os.sched_setaffinity(0, half)
        targets = [stack.enter_context(upstream_server(setup))]
        os.sched_setaffinity(0, cpus if arguments.shared else cpus[len(half) :] or cpus)
        tokenizer = str(model) if arguments.count == "here" else "server"
        for filtered in (True, False) if arguments.unfiltered else (True,):
            targets.append(stack.enter_context(our_front(folder, targets[0], tokenizer, filtered=filtered)))
        if arguments.litellm:
            targets.append(stack.enter_context(litellm_front(folder, arguments.litellm, targets[0])))
        else:
            print("LiteLLM was not measured: no installation given (--litellm).\n")
        print(as_markdown(asyncio.run(compare(targets, arguments.clients, arguments.tokens, arguments.rounds))))


if __name__ == "__main__":
    main()
