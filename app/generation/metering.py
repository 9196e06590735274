"""What an ask costs its caller, and what is written down of it.

Decides how many tokens are set aside before an answer and how many it counts in the end, however it ended.  Knows
neither database nor bucket: budgets and journal are handed in.
"""

import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Protocol

from app.engine.base import EngineInfo
from app.errors import AppError
from app.generation.request_stats import Meter
from app.generation.requests import ChatAsk, CompletionAsk, Delta, Event, Finished
from app.types import InferenceRecord, Principal, Role

_HUNG_UP = 499


class Reservation(Protocol):
    """Tokens set aside."""

    @property
    def counted(self) -> bool:
        """Whether the quota counts what is committed."""

    def commit(self, tokens: int) -> None:
        """Note what was really used."""


class Admission(Protocol):
    """What `access.admission.AdmissionControl` does for a generation."""

    def reserve(self, principal: Principal, tokens: int) -> AbstractAsyncContextManager[Reservation]:
        """Set tokens aside; the difference to what was committed is put back when the context is left.

        Raises: AppError: on entering, if so many are not left.
        """

    def check_rights(self, principal: Principal, *, model: str, logprobs: bool, system_messages: bool) -> None:
        """Raises: Forbidden: the caller's role does not allow one of them."""


class Journal(Protocol):
    """Where records go."""

    def write(self, record: InferenceRecord) -> None:
        """Take a record without waiting."""


class Accounts:
    """Opens an account for each ask; lives as long as the application."""

    def __init__(
        self,
        *,
        admission: Admission,
        journal: Journal,
        cached_prompt: float,
        cached_completion: float,
        keep_text: bool,
    ) -> None:
        """Args:
        admission: takes the tokens out of the caller's limits.
        cached_prompt, cached_completion: how much of its tokens a replayed answer costs, 0 to 1.
        keep_text: put prompt and answer in the records.
        """
        self.admission = admission
        self.cached_prompt = cached_prompt
        self.cached_completion = cached_completion
        self.keep_text = keep_text
        self._journal = journal

    @asynccontextmanager
    async def open(self, ask: CompletionAsk | ChatAsk) -> AsyncIterator["Account"]:
        """Watch over one ask and write its record at the end, whatever that is."""
        account = Account(self, ask)
        try:
            yield account
        except BaseException as error:
            account.failed(error)
            raise
        finally:
            await account.release()
            self._journal.write(account.record())


class Account:
    """One ask's."""

    def __init__(self, accounts: Accounts, ask: CompletionAsk | ChatAsk) -> None:
        self._accounts = accounts
        self._ask = ask
        self._created = datetime.now(UTC)
        self._began = time.monotonic()
        self._info: EngineInfo | None = None
        self._meter: Meter | None = None
        self._prompt_tokens = 0
        self._reserved = AsyncExitStack()
        self._reservation: Reservation | None = None
        self._charged = 0
        self._status = 200
        self._finished: Finished | None = None
        self._prompt: str | None = None
        self._answers: defaultdict[int, list[str]] = defaultdict(list)

    def begin(self, info: EngineInfo, meter: Meter, prompt_tokens: int, *texts: str) -> None:
        """Note what is to be answered, by which model.  Args: texts: what was asked, filtered."""
        self._info, self._meter, self._prompt_tokens = info, meter, prompt_tokens
        if self._accounts.keep_text:
            self._prompt = "\n\n".join(texts)

    async def reserve(self, max_tokens: int) -> None:
        """Set aside what the answers may cost at most.

        Raises: RateLimited, QuotaExceeded: so much is not left; then nothing is taken.
        """
        tokens = self._prompt_tokens + max_tokens * self._ask.sampling.n
        reserving = self._accounts.admission.reserve(self._ask.caller, tokens)
        self._reservation = await self._reserved.enter_async_context(reserving)

    def see(self, event: Event) -> None:
        """Take in what the caller gets."""
        if self._accounts.keep_text and isinstance(event, Delta):
            self._answers[event.index].append(event.text)

    async def settle(self) -> None:
        """Count what the model did: the prompt once it made a token, and every token that it made."""
        if self._meter is None:
            return
        made, replayed = self._meter.made, self._meter.replayed
        prompt = 1.0 if made else self._accounts.cached_prompt if replayed else 0.0
        self._charged = math.ceil(prompt * self._prompt_tokens + made + self._accounts.cached_completion * replayed)
        if self._reservation is not None:
            self._reservation.commit(self._charged)
        await self.release()

    async def release(self) -> None:
        """Put back what was reserved and not used."""
        await self._reserved.aclose()

    def finished(self, finished: Finished) -> Finished:
        """Note that the answers are complete."""
        self._finished = finished
        return finished

    def failed(self, error: BaseException) -> None:
        """Note what ended the ask; a client that goes once its answers are complete is no failure."""
        if self._finished is not None:
            return
        if isinstance(error, AppError):
            self._status = error.status
        else:
            self._status = 500 if isinstance(error, Exception) else _HUNG_UP

    def record(self) -> InferenceRecord:
        """Return all that is known now."""
        ask, info, meter, finished = self._ask, self._info, self._meter, self._finished
        first = meter.first_token_seconds if meter else None
        return InferenceRecord(
            created=self._created,
            request_id=ask.origin.request_id or ask.id,
            key_id=ask.caller.key_id,
            route=ask.origin.route,
            model=info.model if info else "",
            revision=info.revision if info else None,
            adapter=None,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=meter.made + meter.replayed if meter else 0,
            charged_tokens=self._charged,
            counted=self._reservation is not None and self._reservation.counted,
            cached=finished.cached if finished else False,
            finish_reason=finished.finish_reason if finished else None,
            status=self._status,
            first_token_ms=None if first is None else round(1000 * first, 3),
            latency_ms=round(1000 * (time.monotonic() - self._began), 3),
            prompt=self._prompt,
            answer=_joined(list(self._answers.values())) if self._accounts.keep_text else None,
        )


def _joined(answers: Sequence[Sequence[str]]) -> str:
    return "\n\n".join("".join(pieces) for pieces in answers)


def check_rights(admission: Admission, ask: CompletionAsk | ChatAsk, model: str) -> None:
    """Raises: Forbidden: the caller's role does not allow this model, system messages or log-probabilities."""
    system = isinstance(ask, ChatAsk) and any(message.role is Role.SYSTEM for message in ask.messages)
    logprobs = ask.sampling.logprobs is not None
    admission.check_rights(ask.caller, model=model, logprobs=logprobs, system_messages=system)
