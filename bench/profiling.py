"""Profile the API process while it serves a load, and add up where its time goes, by module and by function.

py-spy samples the process from outside and changes nothing in it; it is used where it is installed (`pip install
py-spy`), and has to be allowed to trace processes.  cProfile is always there: it counts every call, at the price of
making small functions look dearer than they are.
"""

import os
import pstats
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.process import ROOT, Server

Tool = Literal["py-spy", "cprofile"]

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SAMPLES_PER_SECOND = 500
MODULES, FUNCTIONS = 30, 45
"""Rows of a report."""
GENERATED = "<generated>"
"""Where functions belong that were compiled from a string, such as the methods of dataclasses."""
ENTRANCE = ("<frozen", "typer", "app.__main__", "app.cli", "app.server", "bench.", "threading:", "asyncio:run")
"""Functions of modules that begin so are left out of the report: they contain everything."""
WRITE_SECONDS = 20.0
"""How long either tool may take to write its file."""

Share = Mapping[str, float]


class ProfileFailed(Exception):
    """The profiler did not start or left no file; the message says why."""


@dataclass(frozen=True)
class Profile:
    """Shares of the time in which the process was busy; each is between 0 and 1.

    py-spy counts threads that hold the interpreter's lock, whichever they are; cProfile counts the main thread only.
    """

    own: Share
    """By module, without what it calls; a built-in function counts for the module that calls it."""
    total: Share
    """By function, as `module:function`, with everything it calls; so these do not add up to 1."""

    def by_package(self) -> Share:
        """Return `own` summed up: by top-level package, and by the packages of `app`."""
        sums: dict[str, float] = defaultdict(float)
        for module, share in self.own.items():
            parts = module.split(".")
            sums[".".join(parts[: 2 if parts[0] == "app" else 1])] += share
        return sums


def module_of(filename: str) -> str:
    """Return the dotted module of a source file: in full within this repository, else at most three parts of it."""
    if filename == "<string>":
        return GENERATED
    path = Path(filename)
    if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
        parts = path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts).removesuffix(".__init__")
    if "site-packages" in path.parts:
        inside = path.parts[path.parts.index("site-packages") + 1 :]
        return ".".join(Path(*inside).with_suffix("").parts[:3]).removesuffix(".__init__")
    if path.is_relative_to(STANDARD_LIBRARY):
        return path.relative_to(STANDARD_LIBRARY).with_suffix("").parts[0]
    return filename


def read_stacks(lines: Iterable[str]) -> Profile:
    """Read py-spy's raw format: a line is `function (file:line);...;function (file:line) samples`, outermost first."""
    own, total = Counter[str](), Counter[str]()
    for line in lines:
        stack, _, count_text = line.rpartition(" ")
        count = int(count_text)
        frames = [_frame(frame) for frame in stack.split(";")]
        own[frames[-1][0]] += count
        for module, function in set(frames):
            total[f"{module}:{function}"] += count
    return Profile(_shares(own, own.total()), _shares(total, own.total()))


def read_stats(path: Path) -> Profile:
    """Read what cProfile dumped."""
    # typeshed does not know the attribute that every reader of such a file needs.
    entries: Mapping[tuple[str, int, str], Any] = pstats.Stats(str(path)).stats  # type: ignore[attr-defined]
    own: dict[str, float] = defaultdict(float)
    total: dict[str, float] = defaultdict(float)
    for (filename, _, function), (_, _, own_seconds, total_seconds, callers) in entries.items():
        if filename != "~":
            own[module_of(filename)] += own_seconds
            total[f"{module_of(filename)}:{function}"] += total_seconds
        elif callers:
            for (caller, _, _), (_, _, seconds, _) in callers.items():
                own["built-in" if caller == "~" else module_of(caller)] += seconds
        else:
            own["built-in"] += own_seconds
    seconds = sum(own.values())
    return Profile(_shares(own, seconds), _shares(total, seconds))


def as_markdown(profile: Profile, title: str, cpu_us: float) -> str:
    """Return a page: packages, modules and functions by share, with microseconds of each request.

    Args: cpu_us: processor time that the process took for one request, in microseconds, while it was profiled.
    """

    def table(head: str, shares: Share, rows: int) -> str:
        first = sorted(shares.items(), key=lambda item: -item[1])[:rows]
        lines = [f"| {name} | {100 * share:.1f} | {share * cpu_us:.0f} |" for name, share in first if share >= 0.001]
        return "\n".join([f"| {head} | % | us a request |", "|---|---|---|", *lines])

    inner = {name: share for name, share in profile.total.items() if not name.startswith(ENTRANCE)}
    return "\n\n".join(
        [
            f"# {title}: {cpu_us:.0f} us of processor time a request",
            "Own time by package (asyncio includes the C code of uvloop and httptools between callbacks):",
            table("package", profile.by_package(), MODULES),
            "Own time by module:",
            table("module", profile.own, MODULES),
            "Time by function, with what it calls:",
            table("function", inner, FUNCTIONS),
            "",
        ]
    )


def installed_tool() -> Tool:
    """Return the best profiler that is there."""
    return "py-spy" if _py_spy() else "cprofile"


def command(tool: Tool, serve: list[str], folder: Path) -> list[str]:
    """Return what starts the service so that `profiled` can look into it, from the command that starts it otherwise."""
    if tool == "py-spy":
        return serve
    arguments = serve[serve.index("app") + 1 :]
    return [sys.executable, "-m", "bench.profiled", str(folder / "cprofile.out"), *arguments]


@contextmanager
def profiled(tool: Tool, server: Server, seconds: float, folder: Path) -> Iterator[list[Profile]]:
    """Profile a server while the block runs; the list holds the profile when the block has ended.

    Raises: ProfileFailed: there is none.
    """
    found: list[Profile] = []
    if tool == "py-spy":
        output = folder / "stacks.txt"
        spy = subprocess.Popen(_spy_command(server.pid, seconds, output), stdout=subprocess.DEVNULL)
        yield found
        if spy.wait(seconds + WRITE_SECONDS) or not output.is_file():
            raise ProfileFailed("py-spy could not look into the service: it needs to run as root or as its parent")
        found.append(read_stacks(output.read_text().splitlines()))
        return
    output = folder / "cprofile.out"
    output.unlink(missing_ok=True)
    os.kill(server.pid, signal.SIGUSR1)
    yield found
    os.kill(server.pid, signal.SIGUSR2)
    until = time.monotonic() + WRITE_SECONDS
    while not output.is_file():
        if time.monotonic() > until:
            raise ProfileFailed("the profiled service wrote no profile")
        time.sleep(0.05)
    found.append(read_stats(output))


def _spy_command(pid: int, seconds: float, output: Path) -> list[str]:
    options = ["--format", "raw", "--full-filenames", "--nolineno", "--gil", "--rate", str(SAMPLES_PER_SECOND)]
    lasts = str(max(1, round(seconds)))
    return [_py_spy() or "py-spy", "record", *options, "--duration", lasts, "--output", str(output), "--pid", str(pid)]


def _py_spy() -> str | None:
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.is_file() else shutil.which("py-spy")


def _frame(text: str) -> tuple[str, str]:
    function, _, place = text.rpartition(" (")
    return (module_of(place.removesuffix(")")), function) if function else (text, "")


def _shares(sums: Mapping[str, float], whole: float) -> Share:
    return {name: value / whole for name, value in sums.items()} if whole else {}
