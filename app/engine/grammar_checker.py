"""Refuses grammars that cannot be enforced before anything is generated, without holding up the event loop."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections import OrderedDict
from pathlib import Path

import app
from app.engine.base import EngineInfo
from app.engine.deadline import deadline
from app.engine.fair_lock import FairLock
from app.errors import EngineFailed, EngineNotReady, InvalidRequest
from app.grammars.compiler import MAX_GRAMMAR_CHARS
from app.requests import GenerationRequest
from app.types import Grammar, Tenant

COMPILE_SECONDS = 2.0
"""A grammar that takes more processor time to compile is refused."""
ANSWER_SECONDS = 30.0
"""The same by the clock, of which a busy machine has less to give: this says nothing of the grammar."""
START_SECONDS = 60.0
"""For the process to read the vocabulary."""
EXIT_SECONDS = 5.0
"""For a process that has closed its output to end."""
REMEMBERED = 1000
"""Grammars whose outcome is known without another look."""
MAX_WAITING = 4
"""Grammars of one tenant that may wait to be tried."""

_ENVIRONMENT = frozenset(["PATH", "LANG", "SYSTEMROOT", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"])
_TOO_COMPLEX, _TOO_SLOW = "is too complex", "takes too long to compile"
_NOT_TRIED = "The grammar could not be tried; try again in a moment."


class GrammarChecker:
    """Tries grammars in a child process, which is started with the first of them; one for each loaded model."""

    def __init__(self, tokenizer_folder: str, vocab_size: int, *, waiting_seconds: float = 60.0) -> None:
        """Args:
        vocab_size: width of the model's logits.
        waiting_seconds: how long a request may take until its grammar has been tried.
        """
        self._command = (
            *(sys.executable, "-P", "-m", "app.grammars.checking_process"),
            *(str(Path(tokenizer_folder).absolute()), str(vocab_size)),
        )
        self._waiting_seconds = waiting_seconds
        self._outcomes: OrderedDict[bytes, str | None] = OrderedDict()
        """Why a grammar is refused, or None, by the grammar's digest."""
        self._lock = FairLock(MAX_WAITING, "Too many grammars wait to be tried. Try again later.")
        self._process: asyncio.subprocess.Process | None = None
        """The one that is ready and has no question to answer, or that of the check that has the turn."""
        self._children: set[asyncio.subprocess.Process] = set()
        """All that have not been ended, one that is being started among them."""
        self._closed = False

    async def check_request(self, request: GenerationRequest, info: EngineInfo) -> None:
        """Return if the request has no grammar, or one that can be enforced.

        Raises: as `check`; InvalidRequest: the model enforces none.
        """
        if request.sampling.grammar is not None:
            info.capabilities.check(request)
            await self.check(request.sampling.grammar, request.tenant)

    async def check(self, grammar: Grammar, tenant: Tenant) -> None:
        """Return if the grammar can be enforced.

        Raises: InvalidRequest: it cannot; names the field `grammar` and says why.
            EngineFailed: it could not be tried.
            EngineBusy, DeadlineExceeded: other grammars are being tried.
            EngineNotReady: the model is being replaced or closed.
        """
        if len(grammar.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest.of_field("grammar", f"is longer than {MAX_GRAMMAR_CHARS} characters")
        digest = hashlib.sha256(json.dumps([grammar.kind, grammar.text]).encode()).digest()
        if digest not in self._outcomes:
            limit = deadline(self._waiting_seconds, "The grammar waited too long to be tried.")
            async with limit, self._lock.hold(tenant, digest):
                if digest not in self._outcomes:
                    self._remember(digest, await self._try(grammar))
        self._outcomes.move_to_end(digest)
        if (reason := self._outcomes[digest]) is not None:
            raise InvalidRequest.of_field("grammar", reason)

    async def close(self) -> None:
        """End the process, if there is one, and start no other."""
        self._closed = True
        self._process = None
        for process in tuple(self._children):
            await self._end(process)

    def _remember(self, digest: bytes, outcome: str | None) -> None:
        self._outcomes[digest] = outcome
        if len(self._outcomes) > REMEMBERED:
            self._outcomes.popitem(last=False)

    async def _try(self, grammar: Grammar) -> str | None:
        """Return why a grammar cannot be enforced; None if it can."""
        try:
            process = await self._running()
        except (OSError, EOFError, TimeoutError) as error:
            self._refuse_if_closed()
            raise EngineFailed(_NOT_TRIED) from error
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await _request(process, grammar)
        except TimeoutError as error:
            await self._end(process)
            raise EngineFailed(_NOT_TRIED) from error
        except (OSError, EOFError):
            # Not killed at once: that takes a dead process's exit status away from the event loop.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_SECONDS):
                    await process.wait()
            await self._end(process)
            self._refuse_if_closed()
            if process.returncode == -signal.SIGPROF:
                return _TOO_SLOW
            # It may also have been killed by somebody else, so the next request tries again.
            raise InvalidRequest.of_field("grammar", _TOO_COMPLEX) from None
        except BaseException:
            # Somebody hung up; the answer is still to come, and must not be taken for that to the next question.
            await self._end(process)
            raise

    async def _running(self) -> asyncio.subprocess.Process:
        """Return the process, which is ready for a question."""
        self._refuse_if_closed()
        if self._process is not None and self._process.returncode is None:
            return self._process
        if self._process is not None:
            await self._end(self._process)
        process = await self._launch()
        try:
            self._refuse_if_closed()
            async with asyncio.timeout(START_SECONDS):
                await _line(process)
            self._refuse_if_closed()
        except BaseException:
            # What it has yet to say must not be taken for an answer.
            await self._end(process)
            raise
        self._process = process
        return process

    async def _launch(self) -> asyncio.subprocess.Process:
        inherited = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # a traceback could show the grammar
            env=inherited | {"PYTHONPATH": str(Path(next(iter(app.__path__))).parent)},
            start_new_session=True,
        )
        self._children.add(process)
        return process

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Kill a process and wait for its end."""
        if self._process is process:
            self._process = None
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()
        self._children.discard(process)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineNotReady("The model is being replaced or closed; try again in a moment.")


async def _request(process: asyncio.subprocess.Process, grammar: Grammar) -> str | None:
    if process.stdin is None:
        raise EOFError
    process.stdin.write(json.dumps([grammar.kind, grammar.text, COMPILE_SECONDS]).encode() + b"\n")
    await process.stdin.drain()
    answer: str | None = json.loads(await _line(process))
    return answer


async def _line(process: asyncio.subprocess.Process) -> bytes:
    line = await process.stdout.readline() if process.stdout is not None else b""
    if not line.endswith(b"\n"):
        raise EOFError("the process has ended")
    return line
