"""Grammars in the sampler: which tokens may come next in a completion that must follow one.

A mask depends on the tokens up to now and not on the logits, so masks are computed in threads of their own while the
model computes the logits.  A grammar that takes long for a mask holds up nobody else's token: its row is late, and the
runner samples it in a later step.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray
from torch import Tensor

from app.grammars.compiler import TOO_COMPLEX, create_matcher, reason_of
from app.grammars.schemas import GrammarError
from app.grammars.vocabulary import Vocabulary
from app.types import Grammar

log = logging.getLogger(__name__)

CACHED_GRAMMARS = 16
"""Compiled grammars that are kept for the next request with the same; each may grow to 100 MB."""
ROWS_EACH = 8
"""Completions of one compiled grammar: they share the states of its lexer, of which there may be so many in all."""
STACK_BYTES = 64 * 2**20
"""Of the thread that compiles: sixty-four times what the API process lets a grammar use."""
SLOW_SECONDS = 0.005
"""A row whose mask took longer is computed by itself from then on, so that the others need not wait for it."""
BITS = torch.arange(8, dtype=torch.uint8)


@dataclass(slots=True)
class Compilation:
    """A grammar that is being compiled to a matcher at the beginning of a completion."""

    grammar: Grammar
    future: Future[LLMatcher]
    uses: int = 0
    """Completions that it is for."""
    is_spent: bool = False
    """Whether the states of its lexer are used up."""

    def done(self) -> bool:
        """Return whether the grammar is compiled, or has failed."""
        return self.future.done()


class RowGrammar:
    """Where one completion stands in its grammar."""

    def __init__(
        self, matcher: LLMatcher, compilation: Compilation, end: int, ends: NDArray[np.uint8], never: NDArray[np.uint8]
    ) -> None:
        """Args:
        matcher: at the beginning of the completion; no other row has it.
        compilation: what it is a copy of.
        end: the token that stands for the end in the matcher's own masks.
        ends: a bit for each token that may end the completion, where the grammar lets it end.
        never: a bit for each token that ends the model's completions and must not stand inside of one.
        """
        self.matcher = matcher
        self.compilation = compilation
        self.failure: str | None = None
        """Why no next token can be determined; the message is for the client."""
        self.must_renew = False
        """Whether other completions have used up what its matcher shares with them, so that it needs one of its own."""
        self.slow = False
        self.job: Future[None] | None = None
        """Computes the next mask; None until it is begun."""
        self.bits: NDArray[np.uint8] = np.zeros(0, np.uint8)
        """The next mask, a bit for each token, once the job is done."""
        self.must_end = False
        """Whether the grammar allows nothing but the end."""
        self._end, self._ends, self._inner = end, ends, ~never
        self._has_ends = bool(ends.any())
        self._tokens: list[int] = []
        self._renewed = False

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is known."""
        return self.failure is not None or (self.job is not None and self.job.done() and not self.must_renew)

    @property
    def is_waiting(self) -> bool:
        """Whether a job for the next mask must be begun."""
        idle = self.job is None or (self.must_renew and self.job.done())
        return idle and self.failure is None

    @property
    def is_over(self) -> bool:
        """Whether the completion is all that the grammar allows, so that it ends without an end token."""
        if self.failure is not None or self.must_renew:
            return False
        return self.matcher.is_stopped() or (self.must_end and not self._has_ends)

    def accept(self, token: int) -> None:
        """Move on by a token that the mask allows and that does not end the completion."""
        self.job, self.must_end = None, False
        self._tokens.append(token)
        if not self.matcher.consume_token(token):
            self._recover_matcher()

    def take_mask(self, bits: NDArray[np.uint8]) -> None:
        """Take the matcher's own mask, in which the grammar's end is one more token."""
        if self.matcher.is_error():
            self._recover_matcher()
        byte, bit = divmod(self._end, 8)
        may_end = bool(bits[byte] >> bit & 1)
        bits[byte] &= ~np.uint8(1 << bit)
        bits &= self._inner
        self.must_end = may_end and not bits.any()
        if may_end:
            bits |= self._ends
        self.bits = bits

    def renew(self, matcher: LLMatcher) -> None:
        """Take a matcher at the beginning of a completion, which shares nothing with other rows."""
        self.matcher, self._renewed = matcher, True
        if self._tokens and not matcher.consume_tokens(self._tokens):
            self._recover_matcher()

    def _recover_matcher(self) -> None:
        """Have the matcher replaced once if it met a limit of its lexer; any other error fails the completion."""
        reason = reason_of(self.matcher.get_error())
        if reason == TOO_COMPLEX:
            self.compilation.is_spent = True
        if reason == TOO_COMPLEX and not self._renewed:
            self.must_renew = True
        else:
            self.fail(reason)

    def fail(self, reason: str) -> None:
        """End the completion with an error.  Args: reason: what of the grammar is at fault, as after its name."""
        self.failure = f"The completion cannot go on: its grammar {reason}."


def _unenforceable(error: BaseException) -> GrammarError:
    # Without its message, which could quote the grammar.
    log.error("a grammar could not be compiled: %s", type(error).__name__)
    return GrammarError("cannot be enforced")


class Grammars:
    """Compiles grammars and computes their masks, in threads that begin when they are first needed."""

    def __init__(self, vocabulary: Vocabulary, model_ends: Collection[int] = ()) -> None:
        """Args: model_ends: the tokens that end the model's completions."""
        self._vocabulary = vocabulary
        # Special ones are in a mask only where the grammar names them.
        self._never = self._bit_set(
            [each for each in model_ends if each < vocabulary.end and not vocabulary.tokens.is_special_token(each)]
        )
        self._compiled: OrderedDict[Grammar, Compilation] = OrderedDict()

    # An executor of one thread for each of our threads: two with one executor would both be as slow as the slower.
    @cached_property
    def _batch_executor(self) -> LLExecutor:
        return LLExecutor(1)

    @cached_property
    def _single_executor(self) -> LLExecutor:
        return LLExecutor(1)

    @cached_property
    def _batched(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "masks")

    @cached_property
    def _single(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "slow-masks")

    @cached_property
    def _compiler(self) -> ThreadPoolExecutor:
        return _thread_with_stack(STACK_BYTES)

    def compile(self, grammar: Grammar) -> Compilation:
        """Return the compiled grammar, or one that is being compiled."""
        compilation = self._compiled.get(grammar)
        if compilation is None or compilation.is_spent or compilation.uses == ROWS_EACH:
            compilation = self._compiled[grammar] = Compilation(grammar, self._begin(grammar))
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        compilation.uses += 1
        return compilation

    def _begin(self, grammar: Grammar) -> Future[LLMatcher]:
        try:
            return self._compiler.submit(create_matcher, self._vocabulary.tokens, grammar)
        except RuntimeError as error:  # no thread could be started
            failed = Future[LLMatcher]()
            failed.set_exception(error)
            return failed

    def wait(self, compilations: Iterable[Compilation], seconds: float) -> None:
        """Return when one of them is done, or after so many seconds."""
        wait([each.future for each in compilations], timeout=seconds, return_when=FIRST_COMPLETED)

    def row(self, compilation: Compilation, end_ids: Collection[int]) -> RowGrammar:
        """Return the state of a new completion, once its grammar is compiled.

        Raises: GrammarError: it cannot be enforced.
        """
        try:
            matcher = compilation.future.result().deep_copy()
        except GrammarError:
            raise
        except BaseException as error:  # noqa: BLE001  # a panic of the Rust library is no Exception
            compilation.is_spent = True
            raise _unenforceable(error) from None
        return RowGrammar(matcher, compilation, self._vocabulary.end, self._bit_set(end_ids), self._never)

    def begin_masks(self, rows: Sequence[RowGrammar]) -> None:
        """Begin the next masks of those rows that have none yet."""
        todo = [row for row in rows if row.is_waiting]
        for row in todo:
            row.slow |= row.must_renew
        if fast := [row for row in todo if not row.slow]:
            job = self._batched.submit(self._compute, fast, self._batch_executor)
            for row in fast:
                row.job = job
        for row in todo:
            if row.slow:
                row.job = self._single.submit(self._compute_single, row, self._single_executor)

    def wait_for_masks(self, rows: Sequence[RowGrammar], seconds: float) -> None:
        """Return when the masks of all rows are known, or after so many seconds."""
        wait({row.job for row in rows if row.job is not None}, timeout=seconds)

    def compute_mask(self, row: RowGrammar) -> None:
        """Compute the next mask of one row, now."""
        if not row.must_renew:
            self._compute([row], self._batch_executor)
        if row.must_renew:
            self._compute_single(row, self._batch_executor)

    def _compute_single(self, row: RowGrammar, executor: LLExecutor) -> None:
        if row.must_renew:
            try:
                row.renew(self._begin(row.compilation.grammar).result())
            except BaseException as error:  # noqa: BLE001  # a panic of the Rust library is no Exception
                row.fail(str(_unenforceable(error)))
            row.must_renew = False
        if row.failure is None:
            self._compute([row], executor)

    def _compute(self, rows: Sequence[RowGrammar], executor: LLExecutor) -> None:
        began = time.perf_counter()
        masks = np.zeros((len(rows), self._vocabulary.mask_bytes), np.uint8)
        matchers = [(row.matcher, index) for index, row in enumerate(rows)]
        try:
            executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.shape[1], len(rows))
        except BaseException as error:  # noqa: BLE001  # a panic of the Rust library is no Exception
            log.error("masks could not be computed: %s", type(error).__name__)
            for row in rows:
                row.fail("cannot be enforced")
            return
        slow = time.perf_counter() - began > SLOW_SECONDS
        for row, bits in zip(rows, masks, strict=True):
            row.slow = slow
            row.take_mask(bits)

    def _bit_set(self, tokens: Collection[int]) -> NDArray[np.uint8]:
        bits = np.zeros(self._vocabulary.mask_bytes, np.uint8)
        for token in tokens:
            if token < 8 * len(bits):
                bits[token // 8] |= np.uint8(1 << token % 8)
        return bits


def _thread_with_stack(size: int) -> ThreadPoolExecutor:
    pool, before = ThreadPoolExecutor(1, "grammars"), threading.stack_size(size)
    try:
        pool.submit(int).result()  # the thread begins with the first task
    finally:
        threading.stack_size(before)
    return pool


def apply_grammars(logits: Tensor, grammars: Sequence[RowGrammar | None]) -> None:
    """Set the logits of tokens that a row's grammar does not allow next to -inf; masks must be known."""
    constrained = [(row, grammar.bits) for row, grammar in enumerate(grammars) if grammar is not None]
    if not constrained:
        return
    rows = [row for row, _ in constrained]
    refused = _refused(np.stack([bits for _, bits in constrained]), logits)
    if len(rows) == logits.shape[0]:
        logits.masked_fill_(refused, -torch.inf)
    else:
        index = torch.tensor(rows).to(logits.device, non_blocking=True)
        logits.index_copy_(0, index, logits.index_select(0, index).masked_fill_(refused, -torch.inf))


def _refused(masks: NDArray[np.uint8], logits: Tensor) -> Tensor:
    """Return (rows, vocab) whether each token is not allowed; tokens without a bit are not."""
    vocab = logits.shape[1]
    if logits.device.type == "cpu":
        # A count beyond the mask pads with zeros, hence the inversion afterwards.
        allowed = np.unpackbits(masks, axis=1, count=vocab, bitorder="little")
        return torch.from_numpy(allowed).view(torch.bool).logical_not_()
    packed = torch.from_numpy(masks).to(logits.device, non_blocking=True)
    bits = (packed[:, :, None] >> BITS.to(logits.device, non_blocking=True) & 1).flatten(1)[:, :vocab]
    return torch.nn.functional.pad(bits == 0, (0, vocab - bits.shape[1]), value=True)
