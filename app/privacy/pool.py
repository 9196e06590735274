"""Redacts where it cannot hold up the event loop: short work at once, long work segment by segment in child processes.

What is short is decided by the work that a scan turns out to be, not by the length: a page of prose takes less than a
line of digits.  Pieces of long texts wait in a queue that is fair between tenants, so that a small text of one is
never behind the large texts of another.  A segment whose process dies is tried once more, then its text fails: closed,
because the caller has nothing to release.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import app
from app.privacy.fair_queue import FairQueue
from app.privacy.redaction_process import decode_result, encode_step, run_step
from app.privacy.redactor import Redaction, Redactor, StreamRedactor, StreamState, TooMuchWorkError

INLINE_CHARS = 6000
"""Longest text that is tried on the event loop."""
INLINE_ATTEMPTS = 120
"""Places that a scan on the event loop may examine closely, about a millisecond in all."""
SEGMENT_CHARS = 4096
"""Text of one step: tens of milliseconds at worst, for which another tenant may have to wait."""
STEP_SECONDS = 30.0
"""A process that takes longer for a step hangs, and is killed."""
_TRIES = 2
"""Processes that may fail at a step before its text does."""
_LINE_BYTES = 2**22

_ENVIRONMENT = frozenset(["PATH", "LANG", "SYSTEMROOT", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"])


class RedactionFailedError(Exception):
    """A text could not be redacted; the message says why and holds nothing of it."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A segment of a text, the state of its stream before it, and where the outcome goes."""

    state: StreamState
    segment: str
    final: bool
    done: asyncio.Future[tuple[str, StreamState]]


class RedactionPool:
    """Redacts texts and streams for many tenants; lives as long as the application."""

    def __init__(self, redactor: Redactor, processes: int = 0, *, command: Sequence[str] | None = None) -> None:
        """
        Args:
            processes: the most child processes, each started when it is first needed; with 0 long texts are worked on
                segment by segment on the event loop.
            command: starts a child process; by default this Python.
        """
        self._redactor = redactor
        self._processes = processes
        kinds, regions = ",".join(redactor.kinds), ",".join(redactor.phone_regions)
        module = (sys.executable, "-P", "-m", "app.privacy.redaction_process")
        self._command = tuple(command or (*module, kinds, regions))
        self._queue: FairQueue[_Step] = FairQueue()
        self._workers: set[asyncio.Task[None]] = set()
        self._children: set[_Child] = set()
        self._idle = 0
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the running children."""
        return [pid for child in self._children if (pid := child.pid) is not None]

    async def redact(self, tenant: Hashable, text: str, *, cut: bool = False) -> Redaction:
        """Return the text without personal data.

        Args: cut: whether the text breaks off: an entity that may have begun at its end is then left out.
        Raises: RedactionFailedError: no process could do it.
        """
        if cut:
            stream = StreamRedactor(self._redactor)
            clean = await self.feed(tenant, stream, text) + stream.finish(cut=True)
            return Redaction(clean, stream.counts)
        if len(text) <= INLINE_CHARS:
            with contextlib.suppress(TooMuchWorkError):
                return self._redactor.redact(text, max_attempts=INLINE_ATTEMPTS)
        stream = StreamRedactor(self._redactor)
        clean = await self._advance(tenant, stream, text, final=True)
        return Redaction(clean, stream.counts)

    async def feed(self, tenant: Hashable, stream: StreamRedactor, delta: str) -> str:
        """Feed a stream the next delta and return the text that may be sent now.

        Raises: RedactionFailedError: no process could do it; the stream is of no use any more.
        """
        if len(delta) <= INLINE_CHARS:
            with contextlib.suppress(TooMuchWorkError):
                return stream.feed(delta, max_attempts=INLINE_ATTEMPTS)
        return await self._advance(tenant, stream, delta, final=False)

    async def close(self) -> None:
        """End the children; what still waits fails."""
        self._closed = True
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        while len(self._queue):
            _fail((await self._queue.get()).done, "the service stops")

    async def _advance(self, tenant: Hashable, stream: StreamRedactor, text: str, *, final: bool) -> str:
        clean = list[str]()
        for begin in range(0, len(text), SEGMENT_CHARS):
            segment = text[begin : begin + SEGMENT_CHARS]
            last = final and begin + SEGMENT_CHARS >= len(text)
            part, stream.state = await self._run(tenant, stream.state, segment, final=last)
            clean.append(part)
        return "".join(clean)

    async def _run(self, tenant: Hashable, state: StreamState, segment: str, *, final: bool) -> tuple[str, StreamState]:
        if not self._processes:
            await asyncio.sleep(0)
            return run_step(self._redactor, state, segment, final=final)
        if self._closed:
            raise RedactionFailedError("the service stops")
        step = _Step(state, segment, final, asyncio.get_running_loop().create_future())
        self._queue.put(tenant, len(segment), step)
        if self._idle < len(self._queue) and len(self._workers) < self._processes:
            worker = asyncio.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
        return await step.done

    async def _work(self) -> None:
        """Take steps from the queue for ever, with a process of its own."""
        child = _Child(self._command)
        self._children.add(child)
        try:
            while True:
                self._idle += 1
                try:
                    step = await self._queue.get()
                finally:
                    self._idle -= 1
                # One that is done already was given up by its request.
                if not step.done.done():
                    await _perform(child, step)
        finally:
            self._children.discard(child)
            await child.stop()


async def _perform(child: _Child, step: _Step) -> None:
    try:
        for _ in range(_TRIES):
            try:
                outcome = await child.run(step)
            except Exception:  # noqa: BLE001  # whatever it is, the text must not pass
                await child.stop()
            else:
                if not step.done.done():
                    step.done.set_result(outcome)
                return
        _fail(step.done, f"{_TRIES} processes failed at it")
    except BaseException:
        _fail(step.done, "the service stops")
        raise


def _fail(done: asyncio.Future[tuple[str, StreamState]], reason: str) -> None:
    if not done.done():
        done.set_exception(RedactionFailedError(reason))


class _Child:
    """A child process, started by the first step and again by the first one after its end."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    async def run(self, step: _Step) -> tuple[str, StreamState]:
        """Raises: OSError, ValueError, EOFError, TimeoutError: the process failed, and has to be stopped."""
        if self.pid is None:
            await self.stop()
            self._process = await self._start()
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise OSError("a process without pipes")
        async with asyncio.timeout(STEP_SECONDS):
            process.stdin.write(encode_step(step.state, step.segment, final=step.final))
            await process.stdin.drain()
            line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the process has ended")
        return decode_result(line)

    async def stop(self) -> None:
        """Kill the process, if there is one, and wait for its end."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        inherited = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # a traceback could show the very text
            env=inherited | {"PYTHONPATH": str(Path(next(iter(app.__path__))).parent)},
            start_new_session=True,
            limit=_LINE_BYTES,
        )
