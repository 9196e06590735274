"""Decide which texts are embedded in the next pass.

Pure: decides from lengths alone, without torch, threads or clocks.  A pass has texts of similar lengths, since all are
padded to the longest, and no more tokens than the budget.  Tenants take turns by start-time fair queueing, as in
`scheduling/scheduler.py`: the one with the lowest virtual time leads a pass, the others fill what is left of it.
"""

from bisect import bisect_left
from dataclasses import dataclass

MAX_PADDING = 0.5
"""A text shorter than this share of the longest one of a pass waits for another: it would be mostly padding."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a request."""

    request_id: int
    position: int
    """Which of the request's texts it is."""
    length: int
    """Its tokens."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request with texts that no pass has had."""

    request_id: int
    tenant: str
    priority: int
    texts: list[Text]
    """The longest first."""


class EmbeddingScheduler:
    """Holds the texts that wait."""

    def __init__(self, max_batch_tokens: int) -> None:
        """Args: max_batch_tokens: of a pass, with padding; a single text may have more."""
        self._budget = max_batch_tokens
        self._requests: dict[int, _Waiting] = {}
        self._virtual_time: dict[str, float] = {}
        """The entries of tenants that have texts now."""

    def __bool__(self) -> bool:
        return bool(self._requests)

    def add(self, request_id: int, lengths: tuple[int, ...], *, tenant: str, priority: int = 0) -> None:
        """Append a request's texts to its tenant's, behind those of the same priority."""
        texts = (Text(request_id, position, length) for position, length in enumerate(lengths))
        longest_first = sorted(texts, key=lambda text: -text.length)
        self._virtual_time.setdefault(tenant, min(self._virtual_time.values(), default=0.0))
        self._requests[request_id] = _Waiting(request_id, tenant, priority, longest_first)

    def remove(self, request_id: int) -> None:
        """Forget a request's texts; unknown ids are ignored."""
        removed = self._requests.pop(request_id, None)
        if removed is not None and all(other.tenant != removed.tenant for other in self._requests.values()):
            del self._virtual_time[removed.tenant]

    def next_pass(self) -> list[Text]:
        """Take the texts of the next pass, the longest first; empty if there are none."""
        taken: list[Text] = []
        for request in self._by_turn():
            longest = taken[0].length if taken else request.texts[0].length
            self._take(request, longest, max(1, self._budget // longest) - len(taken), taken)
        for request_id in {text.request_id for text in taken}:
            if not self._requests[request_id].texts:
                self.remove(request_id)
        return taken

    def _by_turn(self) -> list[_Waiting]:
        """Return the requests, those of the tenant whose turn it is first."""
        return sorted(
            self._requests.values(),
            key=lambda each: (each.priority, self._virtual_time[each.tenant], each.request_id),
        )

    def _take(self, request: _Waiting, longest: int, count: int, taken: list[Text]) -> None:
        """Take up to so many texts of a request that are worth their padding to `longest` tokens, the longest first."""
        lengths = [-text.length for text in request.texts]
        first = bisect_left(lengths, -longest)
        last = min(first + max(0, count), bisect_left(lengths, -MAX_PADDING * longest))
        taken += request.texts[first:last]
        del request.texts[first:last]
        # A text costs what its pass makes of it.
        self._virtual_time[request.tenant] += longest * max(0, last - first)
