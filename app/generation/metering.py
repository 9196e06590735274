"""What an ask costs its caller, and what is written down of it.

Decides how many tokens are set aside before an answer and how many it counts in the end, however it ended.  Knows
neither database nor bucket: budgets and journal are handed in.
"""

import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Protocol

from app.engine.base import EngineInfo
from app.errors import AppError, Forbidden
from app.generation.request_stats import Meter
from app.generation.requests import ChatAsk, CompletionAsk, Delta, Event, Finished
from app.types import InferenceRecord, Principal, Role

_HUNG_UP = 499


class Held(Protocol):
    """Tokens set aside."""

    async def settle(self, tokens: int) -> None:
        """Put what was really used in their place.  Takes effect even if the caller does not wait for it."""


class Budget(Protocol):
    """Something that tokens are taken out of."""

    async def reserve(self, caller: Principal, tokens: int) -> Held | None:
        """Set tokens aside; None: this caller has no such limit.

        Raises: AppError: so many are not left.
        """


class Journal(Protocol):
    """Where records go."""

    def write(self, record: InferenceRecord) -> None:
        """Take a record without waiting."""


class Accounts:
    """Opens an account for each ask; lives as long as the application."""

    def __init__(
        self,
        *,
        rate: Budget,
        quota: Budget,
        journal: Journal,
        cached_prompt: float,
        cached_completion: float,
        keep_text: bool,
    ) -> None:
        """Args:
        rate: tokens a minute.
        quota: tokens a month; what it reserves it also counts.
        cached_prompt, cached_completion: how much of its tokens a replayed answer costs, 0 to 1.
        keep_text: put prompt and answer in the records.
        """
        self.rate = rate
        self.quota = quota
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
        self._held: list[Held] = []
        self._counted = False
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
        try:
            await self._reserve_from(self._accounts.rate, tokens)
            self._counted = await self._reserve_from(self._accounts.quota, tokens)
        except BaseException:
            await self._settle_all(0)
            raise

    async def _reserve_from(self, budget: Budget, tokens: int) -> bool:
        held = await budget.reserve(self._ask.caller, tokens)
        if held is not None:
            self._held.append(held)
        return held is not None

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
        await self._settle_all(self._charged)

    async def _settle_all(self, tokens: int) -> None:
        held, self._held = self._held, []
        # The rate first: it does not wait, so being cancelled in between loses nothing.
        for each in held:
            await each.settle(tokens)

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
            counted=self._counted,
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


def check_rights(ask: CompletionAsk | ChatAsk, model: str) -> None:
    """Raises: Forbidden: the caller's role does not allow this model, system messages or log-probabilities."""
    rights = ask.caller.rights
    if rights.models is not None and model not in rights.models:
        raise Forbidden("The role of this API key does not allow this model.")
    if ask.sampling.logprobs is not None and not rights.raw_logprobs:
        raise Forbidden("The role of this API key does not allow log-probabilities.")
    if isinstance(ask, ChatAsk) and not rights.system_messages and any(m.role is Role.SYSTEM for m in ask.messages):
        raise Forbidden("The role of this API key does not allow system messages.")
