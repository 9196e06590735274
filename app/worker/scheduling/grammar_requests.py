"""Requests whose completion follows a grammar: those that it is compiled for, and those whose next mask is late.

Grammars are compiled and masks computed in threads of their own, beside the steps of the model.  Decides how long a
step waits for them, so that requests without a grammar hardly wait for those with one.
"""

from collections.abc import Collection, Iterator, Mapping

from app.types import Grammar
from app.worker.sampling.grammar import Compilation, Grammars, RowGrammar

LATE_SECONDS, ALL_LATE_SECONDS = 0.005, 0.1
"""How long a step waits for the masks of grammars, with rows that need none of them and without."""
COMPILING_SECONDS = 0.01
"""How long a step without any other work waits for a grammar to be compiled."""


class GrammarRequests:
    """What the batching runner knows of its requests' grammars."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._compiling: dict[int, tuple[Compilation, Collection[int]]] = {}
        """By request; with the tokens that end its completion."""

    def __len__(self) -> int:
        """Requests that wait for their grammar."""
        return len(self._compiling)

    def compile(self, request_id: int, grammar: Grammar, end_ids: Collection[int]) -> None:
        """Begin to compile a request's grammar."""
        self._compiling[request_id] = self._grammars.compile(grammar), end_ids

    def forget(self, request_id: int) -> None:
        """Wait no longer for a request's grammar."""
        self._compiling.pop(request_id, None)

    def take_compiled(self, *, idle: bool) -> Iterator[tuple[int, RowGrammar | str]]:
        """Yield the requests whose grammar is compiled, with its state or why it cannot be enforced.

        Args: idle: whether there is nothing else to do, so that it waits a moment.
        """
        self._grammars.wait((each for each, _ in self._compiling.values()), COMPILING_SECONDS if idle else 0)
        for request_id, (compilation, end_ids) in tuple(self._compiling.items()):
            if not compilation.done():
                continue
            del self._compiling[request_id]
            try:
                yield request_id, self._grammars.row(compilation, end_ids)
            except ValueError as error:
                yield request_id, f"The grammar {error}."

    def begin_masks(self, rows: Collection[RowGrammar]) -> None:
        """Begin to compute the next masks of these rows."""
        self._grammars.begin_masks(list(rows))

    def late(self, rows: Mapping[int, RowGrammar], *, others: bool) -> Collection[int]:
        """Return the requests whose masks are not known, and that nobody else should have to wait for.

        Args: others: whether the step has rows without a grammar.
        """
        waiting = [row for row in rows.values() if not row.is_ready]
        others = others or len(waiting) < len(rows)
        # A row that is known to be slow is waited for only where there is no other.
        quick = [row for row in waiting if not row.slow]
        if quick or not others:
            self._grammars.wait_for_masks(quick or waiting, LATE_SECONDS if others else ALL_LATE_SECONDS)
        return {request_id for request_id, row in rows.items() if not row.is_ready}
