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
from functools import cached_property

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray
from torch import Tensor

from app.grammars.compiler import create_matcher, reason_of
from app.grammars.vocabulary import Vocabulary
from app.types import Grammar

log = logging.getLogger(__name__)

CACHED_GRAMMARS = 64
"""Compiled grammars that are kept for the next request with the same."""
STACK_BYTES = 64 * 2**20
"""Of the thread that compiles: sixty-four times what the API process lets a grammar use."""
SLOW_SECONDS = 0.005
"""A row whose mask took longer is computed by itself from then on, so that the others need not wait for it."""
BITS = torch.arange(8, dtype=torch.uint8)

Compilation = Future[LLMatcher]
"""A grammar that is being compiled to a matcher at the beginning of a completion; fails with GrammarError."""


class RowGrammar:
    """Where one completion stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, end_ids: Collection[int]) -> None:
        """Args:
        matcher: at the beginning of the completion; no other row has it.
        end_ids: the tokens that may end the completion, where the grammar lets it end.
        """
        self.matcher = matcher
        self.failure: str | None = None
        """Why no next token can be determined; the message is for the client."""
        self.slow = False
        self.job: Future[None] | None = None
        """Computes the next mask; None until it is begun."""
        self.bits: NDArray[np.uint8] = np.zeros(0, np.uint8)
        """The next mask, a bit for each token, once the job is done."""
        self.must_end = False
        """Whether the grammar allows nothing but the end."""
        self._end = vocabulary.end
        self._ends = _bit_set([each for each in end_ids if each < 8 * vocabulary.mask_bytes], vocabulary.mask_bytes)
        self._has_ends = bool(end_ids)

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is known."""
        return self.failure is not None or (self.job is not None and self.job.done())

    @property
    def is_over(self) -> bool:
        """Whether the completion is all that the grammar allows, so that it ends without an end token."""
        return self.failure is None and (self.matcher.is_stopped() or (self.must_end and not self._has_ends))

    def accept(self, token: int) -> None:
        """Move on by a token that the mask allows and that does not end the completion."""
        self.job, self.must_end = None, False
        if not self.matcher.consume_token(token):
            self.fail(reason_of(self.matcher.get_error()))

    def take_mask(self, bits: NDArray[np.uint8]) -> None:
        """Take the matcher's own mask, in which the grammar's end is one more token."""
        if self.matcher.is_error():
            self.fail(reason_of(self.matcher.get_error()))
        byte, bit = divmod(self._end, 8)
        may_end = bool(bits[byte] >> bit & 1)
        bits[byte] &= ~np.uint8(1 << bit)
        self.must_end = may_end and not bits.any()
        if may_end:
            bits |= self._ends
        self.bits = bits

    def fail(self, reason: str) -> None:
        """End the completion with an error.  Args: reason: what of the grammar is at fault, as after its name."""
        self.failure = f"The completion cannot go on: its grammar {reason}."


def _bit_set(tokens: Collection[int], length: int) -> NDArray[np.uint8]:
    bits = np.zeros(length, np.uint8)
    for token in tokens:
        bits[token // 8] |= np.uint8(1 << token % 8)
    return bits


class Grammars:
    """Compiles grammars and computes their masks, in threads that begin when they are first needed."""

    def __init__(self, vocabulary: Vocabulary, threads: int = 1) -> None:
        """Args: threads: how many compute the masks of one step, beside those that compute the model."""
        self._vocabulary = vocabulary
        self._threads = threads
        self._compiled: OrderedDict[Grammar, Compilation] = OrderedDict()

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(self._threads)

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
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiler.submit(create_matcher, self._vocabulary.tokens, grammar)
            self._compiled[grammar] = compiled
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return compiled

    def wait(self, compilations: Iterable[Compilation], seconds: float) -> None:
        """Return when one of them is done, or after so many seconds."""
        wait(list(compilations), timeout=seconds, return_when=FIRST_COMPLETED)

    def row(self, compilation: Compilation, end_ids: Collection[int]) -> RowGrammar:
        """Return the state of a new completion, once its grammar is compiled.

        Raises: GrammarError: it cannot be enforced.
        """
        return RowGrammar(compilation.result().deep_copy(), self._vocabulary, end_ids)

    def begin_masks(self, rows: Sequence[RowGrammar]) -> None:
        """Begin the next masks of those rows that have none yet."""
        todo = [row for row in rows if row.job is None and row.failure is None]
        if fast := [row for row in todo if not row.slow]:
            job = self._batched.submit(self._compute, fast)
            for row in fast:
                row.job = job
        for row in todo:
            if row.slow:
                row.job = self._single.submit(self._compute, [row])

    def wait_for_masks(self, rows: Sequence[RowGrammar], seconds: float) -> None:
        """Return when the masks of all rows are known, or after so many seconds."""
        wait({row.job for row in rows if row.job is not None}, timeout=seconds)

    def compute_mask(self, row: RowGrammar) -> None:
        """Compute the next mask of one row, now."""
        self._compute([row])

    def _compute(self, rows: Sequence[RowGrammar]) -> None:
        began = time.perf_counter()
        masks = np.zeros((len(rows), self._vocabulary.mask_bytes), np.uint8)
        matchers = [(row.matcher, index) for index, row in enumerate(rows)]
        try:
            self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.shape[1], len(rows))
        except BaseException as error:  # noqa: BLE001  # a panic of the Rust library is no Exception
            log.error("masks could not be computed: %s", type(error).__name__)
            for row in rows:
                row.fail("cannot be enforced")
            return
        slow = time.perf_counter() - began > SLOW_SECONDS
        for row, bits in zip(rows, masks, strict=True):
            row.slow = slow
            row.take_mask(bits)


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
