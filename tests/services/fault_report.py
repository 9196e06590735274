"""Kill and suspend the worker, Redis and Postgres in turn, and print what clients saw, as tables.

    python -m tests.services.fault_report [--rounds 3] [--seconds 4] [--clients 3] [--only worker]

Redis and Postgres are started for it from the machine's programs.  It exits with 1 if a request hung, was cut off or
got a 5xx without a code.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench import machine
from bench.process import stop_on_sigterm
from tests.services import postgres, redis_server
from tests.services.faults import FAULTS, KINDS, Round, play, staged


def _seconds(values: Sequence[float | None]) -> str:
    """Return median and longest; `never` where one never came."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f} ({max(known):.1f})" if len(known) == len(values) else "never"


def summary(found: Mapping[str, Sequence[Round]]) -> str:
    """Return a row for each fault: how requests ended, and when every kind of them was served again."""
    lines = [
        "| fault | requests | answered | refused or ended by a code | cut | hung | 5xx without a code |"
        " all served after the fault, s | after it is mended, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rounds in found.items():
        outcomes = [outcome for each in rounds for outcome in each.outcomes]
        good = sum(each.is_good for each in outcomes)
        cut, hung = sum(each.is_cut for each in outcomes), sum(each.said == "hung" for each in outcomes)
        nameless = sum(each.is_nameless for each in outcomes)
        counts = [len(outcomes), good, len(outcomes) - good - cut - hung - nameless, cut, hung, nameless]
        broken = _seconds([_all_served(each, each.broken) for each in rounds])
        mended = _seconds([_all_served(each, each.mended) for each in rounds])
        lines.append(f"| {name} | {' | '.join(str(count) for count in counts)} | {broken} | {mended} |")
    return "\n".join(lines)


def _all_served(found: Round, moment: float) -> float | None:
    """Return the seconds until every kind of request had been served again."""
    seconds = [found.served_after(moment, kind) for kind in KINDS]
    known = [each for each in seconds if each is not None]
    return max(known) if len(known) == len(seconds) else None


def details(found: Mapping[str, Sequence[Round]]) -> str:
    """Return a row for each fault and kind of request: every answer, and how soon the first good one came."""
    lines = [
        "| fault | request | answers | served after the fault, s | after it is mended, s |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in found.items():
        for kind in KINDS:
            said = Counter(each.said for found in rounds for each in found.outcomes if each.kind == kind)
            answers = ", ".join(f"{count} x {text}" for text, count in said.most_common())
            after = _seconds([each.served_after(each.broken, kind) for each in rounds])
            mended = _seconds([each.served_after(each.mended, kind) for each in rounds])
            lines.append(f"| {name} | {kind.name} | {answers} | {after} | {mended} |")
    return "\n".join(lines)


def problems(found: Mapping[str, Sequence[Round]]) -> list[str]:
    """Return what must never happen: a request that hangs, a 5xx without a code, a connection that is cut."""
    everything = [(name, outcome) for name, rounds in found.items() for each in rounds for outcome in each.outcomes]
    return [
        f"{name}: {outcome.kind.name}: {outcome.said}"
        for name, outcome in everything
        if outcome.said == "hung" or outcome.is_cut or outcome.is_nameless
    ]


async def run(names: Sequence[str], rounds: int, seconds: float, clients: int) -> Mapping[str, Sequence[Round]]:
    """Play these faults so many times, in turn.  Raises: RuntimeError: a program is missing on this machine."""
    programs, program = postgres.binaries(), redis_server.program()
    if programs is None or program is None:
        raise RuntimeError("needs the programs of Postgres and Redis (Debian: apt-get install postgresql redis-server)")
    found: dict[str, list[Round]] = {name: [] for name in names}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database = stack.enter_context(postgres.running(programs))
        redis = stack.enter_context(redis_server.running(program))
        async with staged(redis, database, database.database("faults"), folder) as stage:
            for number in range(rounds):
                for name in names:
                    sys.stderr.write(f"round {number + 1} of {rounds}: {name}\n")
                    found[name].append(await play(stage, FAULTS[name], seconds, clients))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of all faults")
    parser.add_argument("--seconds", type=float, default=4, help="until a fault is mended")
    parser.add_argument("--clients", type=int, default=3, help="of each kind")
    parser.add_argument("--only", default="", help="only faults whose name has this in it")
    arguments = parser.parse_args()
    names = [name for name in FAULTS if arguments.only in name]
    stop_on_sigterm()
    try:
        found = asyncio.run(run(names, arguments.rounds, arguments.seconds, arguments.clients))
    except RuntimeError as error:
        sys.exit(str(error))
    load = f"{arguments.clients * len(KINDS)} clients, {arguments.clients} of each kind"
    lasting = f"faults of {arguments.seconds:g} s, rounds: {arguments.rounds}; seconds are median (longest)."
    sys.stdout.write(f"{machine.describe()}\n\n{load}; {lasting}\n\n{summary(found)}\n\n{details(found)}\n")
    if wrong := problems(found):
        sys.exit("\n".join(["What must not happen:", *wrong]))


if __name__ == "__main__":
    main()
