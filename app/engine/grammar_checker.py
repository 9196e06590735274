"""Refuses grammars that cannot be enforced before anything is generated, without holding up the event loop."""

import asyncio
import contextlib
import json
import os
import sys
from collections import OrderedDict
from pathlib import Path

import app
from app.engine.base import EngineInfo
from app.errors import EngineFailed, InvalidRequest
from app.grammars.compiler import MAX_GRAMMAR_CHARS
from app.requests import GenerationRequest
from app.types import Grammar

CHECK_SECONDS = 5.0
"""A grammar that takes longer to compile is refused."""
START_SECONDS = 60.0
"""For the process to read the vocabulary."""
REMEMBERED = 1000
"""Grammars whose outcome is known without another look."""

_ENVIRONMENT = frozenset(["PATH", "LANG", "SYSTEMROOT", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"])
_TOO_COMPLEX = "is too complex"


class GrammarChecker:
    """Tries grammars in a child process, which is started with the first of them; one for each loaded model."""

    def __init__(self, tokenizer_folder: str, vocab_size: int) -> None:
        """Args: vocab_size: width of the model's logits."""
        self._command = (
            *(sys.executable, "-P", "-m", "app.grammars.checking_process"),
            *(str(Path(tokenizer_folder).absolute()), str(vocab_size)),
        )
        self._outcomes: OrderedDict[Grammar, str | None] = OrderedDict()
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def check_request(self, request: GenerationRequest, info: EngineInfo) -> None:
        """Return if the request has no grammar, or one that can be enforced.

        Raises: as `check`; InvalidRequest: the model enforces none.
        """
        if request.sampling.grammar is not None:
            info.capabilities.check(request)
            await self.check(request.sampling.grammar)

    async def check(self, grammar: Grammar) -> None:
        """Return if the grammar can be enforced.

        Raises: InvalidRequest: it cannot; names the field `grammar` and says why.
            EngineFailed: it could not be tried.
        """
        if len(grammar.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest.of_field("grammar", f"is longer than {MAX_GRAMMAR_CHARS} characters")
        if grammar not in self._outcomes:
            async with self._turn:
                if grammar not in self._outcomes:
                    await self._try(grammar)
        self._outcomes.move_to_end(grammar)
        if (reason := self._outcomes[grammar]) is not None:
            raise InvalidRequest.of_field("grammar", reason)

    async def close(self) -> None:
        """Kill the process, if there is one, and wait for its end."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()

    async def _try(self, grammar: Grammar) -> None:
        try:
            process = await self._running()
        except (OSError, EOFError, TimeoutError) as error:
            await self.close()
            raise EngineFailed("The grammar could not be tried; try again in a moment.") from error
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                self._outcomes[grammar] = await _request(process, [grammar.kind, grammar.text])
        except TimeoutError:
            await self.close()
            self._outcomes[grammar] = "takes too long to compile"
        except (OSError, EOFError):
            # It may also have been killed by somebody else, so the next request tries again.
            await self.close()
            raise InvalidRequest.of_field("grammar", _TOO_COMPLEX) from None
        except BaseException:
            # Somebody hung up; the answer is still to come, and must not be taken for that to the next question.
            await self.close()
            raise
        if len(self._outcomes) > REMEMBERED:
            self._outcomes.popitem(last=False)

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            await self.close()
            inherited = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # a traceback could show the grammar
                env=inherited | {"PYTHONPATH": str(Path(next(iter(app.__path__))).parent)},
                start_new_session=True,
            )
            async with asyncio.timeout(START_SECONDS):
                await _line(self._process)
        return self._process


async def _request(process: asyncio.subprocess.Process, question: list[str]) -> str | None:
    if process.stdin is None:
        raise EOFError
    process.stdin.write(json.dumps(question).encode() + b"\n")
    await process.stdin.drain()
    answer: str | None = json.loads(await _line(process))
    return answer


async def _line(process: asyncio.subprocess.Process) -> bytes:
    line = await process.stdout.readline() if process.stdout is not None else b""
    if not line.endswith(b"\n"):
        raise EOFError("the process has ended")
    return line
