"""The result of `bench.serve` as data, as tables and as a page.  The page can be made again from the data alone:

python -m bench.report docs/benchmarks/serve.json
"""

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.engine import Compared
from bench.figures import Measured
from bench.load import LOADS
from bench.machine import processor
from bench.peers import PEERS, Setup

Result = dict[str, Any]
"""What serve.json holds."""

TITLES = {peer.name: peer.title for peer in PEERS}
LOAD_TITLES = {load.name: load.title for load in LOADS}
MEGABYTE = 1_000_000
ALLOWED_MEGABYTES = 600
"""What the worker may take beside weights and KV rows."""
MOST_ROWS = 32
"""Of KV cache that the service makes by itself."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
INTRO = """# This service beside other servers

`make bench`: the same model, type, threads and requests for every server, over HTTP on one machine. All servers are
started, one is awake at a time, and they take turns; the figures are {rounds}. Only the ratios say
something about another machine. The model is a Llama of {megaparameters:.0f} million random weights made by the script,
whose every word is one token, so all prompts have exactly the length they are said to have and no two are alike.
"First token" is from sending the request to the first text, "between" from each piece of text to the next.

Every server runs with its defaults but for two: `--continuous-batching` gets a KV cache of 128 blocks of 256 tokens and
1024 tokens a step, without which it is many times slower on a CPU, and vLLM (its CPU build, if it is there) all cores,
where by itself it keeps one free, and the OpenMP library that it asks for.

{machine}

![Tokens per second of each server under each load](serve.png)
"""


def result(
    measured: Sequence[Measured],
    engine: Sequence[Compared],
    memory: dict[str, list[int]],
    missing: dict[str, str],
    setup: Setup,
    rounds: int,
) -> Result:
    """Gather everything that a reader may want to know of a run."""
    config = json.loads((setup.model / "config.json").read_text())
    parameters = (setup.model / "model.safetensors").stat().st_size // ITEM_BYTES["bfloat16"]
    token_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    item = ITEM_BYTES[setup.dtype]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "rounds": rounds,
        "dtype": setup.dtype,
        "threads": setup.threads,
        "machine": {"cpu": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "parameters": parameters,
        "weights_bytes": parameters * item,
        "rows_bytes": MOST_ROWS * config["max_position_embeddings"] * token_bytes * item,
        "missing": missing,
        "memory": memory,
        "loads": [each.as_json() for each in measured],
        "engine": [each.as_json() for each in engine],
    }


def tables(result: Result) -> str:
    """Return all tables that there are figures for, in Markdown."""
    parts = [_load_table(result), _turn_table(result), _engine_table(result), _memory(result), _client(result)]
    return "\n".join(part for part in parts if part)


def page(result: Result) -> str:
    """Return docs/benchmarks/serve.md."""
    machine = result["machine"]
    ran = (
        f"{result['date']}, {machine['cores']} cores of {machine['cpu']}, {result['threads']} threads, "
        f"{result['dtype']}; Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    )
    rounds = f"medians of {result['rounds']} rounds" if result["rounds"] > 1 else "those of one round"
    intro = INTRO.format(rounds=rounds, megaparameters=result["parameters"] / 1e6, machine=f"{ran}.")
    return f"{intro}\n{tables(result)}"


def keep(result: Result, folder: Path, *, page: bool) -> None:
    """Write serve.json and serve.png, and serve.md if asked for; without matplotlib there is no plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serve.json").write_text(json.dumps(result, indent=1) + "\n")
    if page:
        write_page(result, folder)
    try:
        from bench.plot import draw
    except ImportError:
        print("no plot: pip install -e '.[bench]' brings matplotlib", file=sys.stderr)
        return
    draw(result, folder / "serve.png")


def write_page(result: Result, folder: Path) -> None:
    """Write serve.md beside its data."""
    (folder / "serve.md").write_text(page(result))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _load_table(result: Result) -> str:
    head = ("load", "server", "tokens/s", "ours ÷ it", "first token p50, p95, ms", "between p50, p95, ms")
    ours = {each["load"]: each["median"] for each in result["loads"] if each["peer"] == "ours"}
    rows = [_load_row(each, ours.get(each["load"])) for each in result["loads"]]
    rows += [("all", TITLES[name], _why_not(why), "", "", "") for name, why in result["missing"].items()]
    return _table(head, rows) if rows else ""


def _load_row(one: dict[str, Any], ours: dict[str, float] | None) -> tuple[str, ...]:
    names = LOAD_TITLES[one["load"]], TITLES[one["peer"]]
    if (figures := one["median"]) is None:
        return *names, _why_not(one["failure"]), "", "", ""
    ratio = f"{ours['tokens_per_second'] / figures['tokens_per_second']:.2f}" if ours and one["peer"] != "ours" else ""
    return (
        *names,
        f"{figures['tokens_per_second']:.1f}",
        ratio,
        f"{figures['first_token_p50_ms']:.0f}, {figures['first_token_p95_ms']:.0f}",
        f"{figures['between_p50_ms']:.0f}, {figures['between_p95_ms']:.0f}",
    )


def _why_not(reason: str | None) -> str:
    return f"not measured: {(reason or '').splitlines()[0]}".replace("|", "/")


def _turn_table(result: Result) -> str:
    """Show how much longer the last turn of a conversation waits than the first."""
    rows = []
    for one in result["loads"]:
        if not one["turns_ms"] or one["median"] is None:
            continue
        first, last = (statistics.median(turns[turn] for turns in one["turns_ms"]) for turn in (0, -1))
        rows.append(
            (
                TITLES[one["peer"]],
                f"{first:.0f} ({one['prompt_tokens'][0]} tokens)",
                f"{last:.0f} ({one['prompt_tokens'][-1]} tokens)",
                f"{last / first:.2f}",
            )
        )
    head = ("conversation", "first token of the first turn, ms", "of the last turn, ms", "last ÷ first")
    return _table(head, rows) if rows else ""


def _engine_table(result: Result) -> str:
    head = ("engine alone, sequences at once", "engine, tokens/s", "static batch loop, tokens/s", "engine ÷ loop")
    rows = [
        (
            f"{one['batch']} ({one['runner']})",
            f"{statistics.median(one['engine']):.1f}",
            f"{statistics.median(one['loop']):.1f}",
            f"{one['ratio']:.2f}",
        )
        for one in result["engine"]
    ]
    return _table(head, rows) if rows else ""


def _memory(result: Result) -> str:
    if not result["memory"]:
        return ""
    rows = [(TITLES[name], f"{sum(each) / MEGABYTE:.0f}") for name, each in result["memory"].items()]
    table = _table(("after all loads", "resident memory, MB"), rows)
    if "ours" not in result["memory"]:
        return table
    worker, weights, kv = (
        round(each / MEGABYTE)
        for each in (max(result["memory"]["ours"]), result["weights_bytes"], result["rows_bytes"])
    )
    rest = worker - weights
    verdict = "within" if rest <= kv + ALLOWED_MEGABYTES else "ABOVE"
    return (
        f"{table}\nThe worker of this service holds {worker} MB: {weights} MB of weights and {rest} MB of KV rows and "
        f"all else, {verdict} the {kv} MB of {MOST_ROWS} full rows and {ALLOWED_MEGABYTES} MB allowed.\n"
    )


def _client(result: Result) -> str:
    shares = [each["median"]["client_share"] for each in result["loads"] if each["median"]]
    return f"The client took at most {100 * max(shares):.1f} % of the processor time of any load.\n" if shares else ""


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_page(json.loads(source.read_text()), source.parent)
