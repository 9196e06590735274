"""Measure this service beside other servers of the same model, in one run, over HTTP.

    python -m bench.serve [--quick] [--only ours,serve] [--loads c8,chat] [--vllm PATH] [--openvino PATH]
                          [--llama-cpp PATH] [--write]

The servers get a generated model (`bench.model`), the same type and threads, and the same loads (`bench.load`).  All
are started, but only one is awake at a time, and they take turns within each round: what slows the machine down hits
every one.  Figures are medians of the rounds; only ratios say something about another machine.
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench import report
from bench.engine import BATCHES, Compared, compare
from bench.figures import Figures, Measured
from bench.load import LOADS, WARM_UP, Load, run_load
from bench.peers import PEERS, Dtype, Peer, Setup
from bench.process import ROOT, Server, ServerFailed, free_port, serving, stop_on_sigterm
from bench.wire import RequestFailed, TimedResponse
from bench.words import text

ENGINE = "engine"
"""What --loads calls the engine alone beside the static batch loop."""
QUICK_LOADS = ("c1", "c8", "chat", ENGINE)
SYSTEM_WORDS = 16
LOAD_SECONDS = 1800
"""A round of one load on one server that takes longer has failed."""


@dataclass
class Run:
    """What has been measured so far."""

    missing: dict[str, str] = field(default_factory=dict)
    """Peers that could not be started, and why."""
    measured: list[Measured] = field(default_factory=list)
    engine: list[Compared] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=dict)
    """Bytes of each process of a server after the loads, by peer."""


def report_progress(line: str) -> None:
    """Print a line of progress to standard error; the tables go to standard output."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


async def _responses(load: Load, peer: Peer, setup: Setup, port: int, seed: str) -> list[TimedResponse]:
    try:
        async with asyncio.timeout(LOAD_SECONDS):
            return await run_load(load, peer, setup, port, seed)
    except TimeoutError:
        raise RequestFailed(f"not done after {LOAD_SECONDS} s") from None


def start(peer: Peer, setup: Setup, stack: ExitStack) -> Server:
    """Start a server, warm it up, and suspend it.

    Raises: ServerFailed, RequestFailed: it does not work.
    """
    report_progress(f"starting {peer.title}")
    port = free_port()
    log = setup.folder / f"{peer.name}.log"
    server = stack.enter_context(
        serving(peer.command(setup, port), port, peer.environment(setup), peer.ready, log),
    )
    asyncio.run(_responses(WARM_UP, peer, setup, port, "warm-up"))
    server.pause()
    return server


def start_all(peers: Sequence[Peer], setup: Setup, run: Run, stack: ExitStack) -> dict[str, Server]:
    """Start every peer that can be started; record why the others cannot."""
    servers = {}
    for peer in peers:
        reason = peer.missing(setup)
        if reason is None:
            try:
                servers[peer.name] = start(peer, setup, stack)
            except (ServerFailed, RequestFailed) as error:
                reason = str(error)
        if reason is not None:
            report_progress(f"{peer.title} is left out: {reason}")
            run.missing[peer.name] = reason
    return servers


@dataclass(frozen=True)
class Round:
    """One round of a load on one server."""

    figures: Figures
    first_tokens_ms: list[float]
    prompt_tokens: list[int]


def measure(load: Load, peer: Peer, setup: Setup, server: Server, seed: str) -> Round:
    """Resume a server, warm it up, run a load against it, and suspend it again.

    Raises: RequestFailed: a request failed.
    """
    server.resume()
    try:
        asyncio.run(_responses(WARM_UP, peer, setup, server.port, f"{seed}/warm-up"))
        client, busy = time.process_time(), server.cpu_seconds()
        responses = asyncio.run(_responses(load, peer, setup, server.port, seed))
        client, busy = time.process_time() - client, server.cpu_seconds() - busy
    finally:
        server.pause()
    figures = Figures.of(responses, client, busy)
    return Round(figures, [1000 * each.first_token for each in responses], [each.prompt_tokens for each in responses])


def measure_load(
    load: Load, peers: Sequence[Peer], setup: Setup, servers: dict[str, Server], rounds: int, run: Run
) -> None:
    """Run a load against every server in each round, each round starting with the next server."""
    done: dict[str, list[Round]] = {peer.name: [] for peer in peers}
    failed: dict[str, str] = {}
    for number in range(rounds):
        first = number % len(peers)
        for peer in [*peers[first:], *peers[:first]]:
            if peer.name in failed:
                continue
            try:
                one = measure(load, peer, setup, servers[peer.name], f"{load.name}/{number}")
            except RequestFailed as error:
                failed[peer.name] = str(error)
                report_progress(f"{load.title}, {peer.title}: failed: {error}")
                continue
            done[peer.name].append(one)
            report_progress(
                f"{load.title}, round {number + 1}, {peer.title}: {one.figures.tokens_per_second:.1f} tokens/s"
            )
    for peer in peers:
        each = done[peer.name]
        run.measured.append(
            Measured(
                load=load.name,
                peer=peer.name,
                rounds=[one.figures for one in each],
                turns_ms=[part for one in each for part in conversations(one.first_tokens_ms, load.turns)],
                prompt_tokens=each[0].prompt_tokens[: load.turns] if each else (),
                failure=failed.get(peer.name),
            )
        )


def conversations(responses: Sequence[float], turns: int) -> list[Sequence[float]]:
    """Split the measurements of a round by conversation; return none where the load has no conversations."""
    return [responses[begin : begin + turns] for begin in range(0, len(responses), turns)] if turns else []


def prepare_model(folder: Path, shape: str) -> str:
    """Generate the model unless it exists; return the type that this machine computes in fastest."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench.model", str(folder), "--shape", shape]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def run_all(arguments: argparse.Namespace, setup: Setup) -> Run:
    """Measure the chosen loads on the chosen servers."""
    run = Run()
    loads = [load.shortened() if arguments.quick else load for load in LOADS if load.name in arguments.loads]
    with ExitStack() as stack:
        if loads:
            chosen = [peer for peer in PEERS if peer.name in arguments.only]
            servers = start_all(chosen, setup, run, stack)
            present = [peer for peer in chosen if peer.name in servers]
            for load in loads if present else ():
                measure_load(load, present, setup, servers, arguments.rounds, run)
            run.memory = {name: server.rss_bytes() for name, server in servers.items()}
    if ENGINE in arguments.loads:
        batches = BATCHES[:2] if arguments.quick else BATCHES
        run.engine = asyncio.run(compare(setup, arguments.rounds, report_progress, batches))
    return run


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [peer.name for peer in PEERS]
    loads = [*(load.name for load in LOADS), ENGINE]
    parser.add_argument("--only", type=_listed(names), default=names, help=f"servers: {','.join(names)}")
    parser.add_argument("--loads", type=_listed(loads), help=f"loads: {','.join(loads)}")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --quick")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default what this machine is fastest in")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="by default all cores")
    parser.add_argument("--vllm", type=Path, help="virtual environment with vLLM, or its vllm program")
    parser.add_argument("--openvino", type=Path, help="virtual environment with OpenVINO GenAI")
    parser.add_argument("--llama-cpp", type=Path, help="virtual environment with llama-cpp-python")
    parser.add_argument("--shape", choices=("135m", "tiny"), default="135m", help="tiny only tries the program out")
    parser.add_argument("--quick", action="store_true", help="a minute or two; writes nothing unless --out says where")
    parser.add_argument("--out", type=Path, help="folder for serve.json and serve.png (docs/benchmarks)")
    parser.add_argument("--write", action="store_true", help="write the table to serve.md there too")
    arguments = parser.parse_args(argv)
    arguments.loads = arguments.loads or (QUICK_LOADS if arguments.quick else loads)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    if arguments.out is None and (arguments.write or not arguments.quick):
        arguments.out = ROOT / "docs" / "benchmarks"
    return arguments


def _listed(known: Sequence[str]) -> Callable[[str], list[str]]:
    def names(value: str) -> list[str]:
        given = value.split(",")
        if unknown := sorted(set(given) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return given

    return names


def main() -> None:
    """Measure, print the tables, and write the files."""
    stop_on_sigterm()
    arguments = parse()
    model = ROOT / ".cache" / "bench" / f"llama-{arguments.shape}"
    fastest = prepare_model(model, arguments.shape)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        system = text(random.Random(0), SYSTEM_WORDS).strip()
        dtype: Dtype = "bfloat16" if (arguments.dtype or fastest) == "bfloat16" else "float32"
        peers = {"vllm": arguments.vllm, "openvino": arguments.openvino, "llama_cpp": arguments.llama_cpp}
        setup = Setup(model, dtype, arguments.threads, Path(folder), system, **peers)
        run = run_all(arguments, setup)
    result = report.result(run.measured, run.engine, run.memory, run.missing, setup, arguments.rounds)
    print(report.tables(result))
    if arguments.out is not None:
        report.write(result, arguments.out, page=arguments.write)
    if any(each.peer == "ours" and each.failure for each in run.measured) or "ours" in run.missing:
        sys.exit(1)


if __name__ == "__main__":
    main()
