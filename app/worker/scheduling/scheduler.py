"""Who takes part in the next step of the model, and in which row of the KV cache.

Pure: decides from counts alone.  Knows no torch, no threads, no clocks, no sampling.  The runner asks for a `Plan`,
runs it, and says `computed`; sequences come with `add` and go with `remove` between steps.

Tenants share the model by start-time fair queueing (Goyal, Vin and Cheng 1996): each has a virtual time that grows with
the tokens computed for it, the least goes first, and a tenant that comes back starts at the least of those present.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from app.worker.scheduling.schedule import Copy, Plan, Sequence, Work

SHARED_LEAST = 32
"""Waiting for another sequence to compute a shared beginning pays from this many tokens on."""
CHUNK_LEAST = 16
"""A smaller piece of a long prompt is not worth a place in a step."""
PROMPT_EVERY = 3
"""In every so many steps a tenant has its next prompts computed while another one makes fewer tokens in a step."""


@dataclass(slots=True)
class _Row:
    """A place in the KV cache; keeps what its last sequence left there until it is needed."""

    index: int
    holder: Sequence | None = None
    tenant: str = ""
    kept: list[int] = field(default_factory=list)
    """Tokens whose keys and values are still there, once the holder has gone."""
    freed: int = 0
    """When the holder went; the row that was freed first is given away first."""

    def known(self) -> tuple[list[int], int]:
        """Return tokens, and how many of them are computed here."""
        return (self.kept, len(self.kept)) if self.holder is None else (self.holder.tokens, self.holder.computed)


class Scheduler:
    """Keeps the waiting line, the rows and the shares."""

    def __init__(self, rows: int, *, reuse: bool = True) -> None:
        """Args:
        rows: sequences that can be in the KV cache at once, >= 1.
        reuse: whether a sequence may start from keys and values that another of its tenant has left or is computing.
        """
        self._rows = [_Row(index) for index in range(rows)]
        self._reuse = reuse
        self._sequences: dict[int, Sequence] = {}
        self._waiting: dict[str, deque[Sequence]] = {}
        self._virtual: dict[str, float] = {}
        """Of the tenants that have sequences now."""
        self._step = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, number: int) -> bool:
        return number in self._sequences

    @property
    def tenants(self) -> int:
        """How many tenants have sequences."""
        return len(self._virtual)

    @property
    def starting(self) -> int:
        """How many sequences have a row, or could get a free one, and not all of their prompt computed."""
        unfinished = sum(s.left > 1 for s in self.running)
        free = sum(row.holder is None for row in self._rows)
        return unfinished + min(free, sum(map(len, self._waiting.values())))

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have rows, by row."""
        return [row.holder for row in self._rows if row.holder is not None]

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its tenant's line."""
        self._sequences[sequence.number] = sequence
        if sequence.tenant not in self._virtual:
            self._virtual[sequence.tenant] = min(self._virtual.values(), default=0.0)
        self._waiting.setdefault(sequence.tenant, deque()).append(sequence)

    def remove(self, number: int, *, forget: bool = False) -> Sequence | None:
        """Take a sequence out, wherever it is; its row is free at once.  Returns None if there is no such sequence.

        Args: forget: what it computed must not be used again.
        """
        sequence = self._sequences.pop(number, None)
        if sequence is None:
            return None
        if sequence.row is None:
            self._waiting[sequence.tenant].remove(sequence)
            self._drop_empty_line(sequence.tenant)
        else:
            self._free(sequence, forget=forget)
        if all(other.tenant != sequence.tenant for other in self._sequences.values()):
            del self._virtual[sequence.tenant]
        return sequence

    def plan(self, *, prompt_tokens: int, width: int | None = None) -> Plan:
        """Give out free rows and choose what the next step computes.

        Args:
            prompt_tokens: how many tokens of unfinished prompts the step may hold beside the single ones, >= 1.
            width: at most so many single tokens where one tenant has many and another few; None is no limit.
        """
        self._step += 1
        copies, begun = self._admit()
        lines = self._ready()
        least = min((len(lines.get(tenant, ())) for tenant in self._held()), default=0)
        ahead = {tenant for tenant, line in lines.items() if len(line) > least}
        # Where all have more than an equal share, a shorter step would only make all of them wait for their turns.
        shorter = width is not None and ahead and least * len(lines) <= width
        work = [Work(sequence, 1) for sequence in sorted(self._pick(lines, width if shorter else None), key=_by_row)]
        work += self._pieces(prompt_tokens, ahead if self._step % PROMPT_EVERY else ())
        return Plan(work, copies, begun)

    def computed(self, work: Iterable[Work]) -> None:
        """Take note that these pieces of a plan have been computed."""
        for piece in work:
            sequence = piece.sequence
            sequence.computed += piece.count
            sequence.served = self._step
            if sequence.tenant in self._virtual:
                self._virtual[sequence.tenant] += piece.count

    def _ready(self) -> dict[str, deque[Sequence]]:
        """The sequences that can make a token, by tenant; who has waited longest first."""
        lines: dict[str, deque[Sequence]] = {}
        for sequence in sorted((s for s in self.running if s.left == 1), key=lambda s: s.served):
            lines.setdefault(sequence.tenant, deque()).append(sequence)
        return lines

    def _pick(self, lines: Mapping[str, deque[Sequence]], width: int | None) -> list[Sequence]:
        """Choose who makes a token: of each tenant in turn, as many as fit; all where there is no limit."""
        ready = sum(map(len, lines.values()))
        places = ready if width is None else min(width, ready)
        chosen: list[Sequence] = []
        while len(chosen) < places:
            for line in lines.values():
                if line and len(chosen) < places:
                    chosen.append(line.popleft())
        return chosen

    def _pieces(self, budget: int, held_back: Collection[str]) -> Iterator[Work]:
        """Deal the budget for prompts to those who are behind, a whole rest at a time where it fits."""
        unfinished = [s for s in self.running if s.left > 1 and s.tenant not in held_back]
        for sequence in sorted(unfinished, key=lambda s: (self._virtual[s.tenant], s.number)):
            yield Work(sequence, min(sequence.left, budget))
            budget -= sequence.left
            if budget < CHUNK_LEAST:
                return

    def _admit(self) -> tuple[list[Copy], list[Sequence]]:
        copies: list[Copy] = []
        begun: list[Sequence] = []
        passed: set[str] = set()
        while (tenant := self._next_tenant(passed)) is not None:
            sequence, giver = self._waiting[tenant][0], self._who_gives_way(tenant)
            if giver is None and not self._has_free_row():
                passed.add(tenant)
                continue
            source, shared = self._best(sequence)
            if self._should_wait(sequence, shared):
                passed.add(tenant)
                continue
            if giver is not None:
                self._put_back(giver)
            self._waiting[tenant].popleft()
            self._drop_empty_line(tenant)
            copies += self._place(sequence, source, shared)
            if not sequence.begun:
                sequence.begun = True
                sequence.reused = sequence.computed
                begun.append(sequence)
        return copies, begun

    def _next_tenant(self, passed: set[str]) -> str | None:
        """Whose turn it is to get a row: who has fewest, and of these who got least."""
        held = self._held()
        lines = [tenant for tenant in self._waiting if tenant not in passed]
        return min(lines, key=lambda t: (held.get(t, 0), self._virtual[t], self._waiting[t][0].number), default=None)

    def _held(self) -> dict[str, int]:
        held: dict[str, int] = {}
        for sequence in self.running:
            held[sequence.tenant] = held.get(sequence.tenant, 0) + 1
        return held

    def _should_wait(self, sequence: Sequence, there: int) -> bool:
        """Whether a running sequence is computing more of a shared beginning than is there, to be copied soon."""
        if not self._reuse:
            return False
        most = len(sequence.tokens) - 1
        for other in self.running:
            if other.tenant != sequence.tenant or other.left <= 1:
                continue
            shared = min(common_length(other.tokens, sequence.tokens), most)
            gain = shared - there
            if gain >= SHARED_LEAST or (gain > 0 and shared == most):
                return True
        return False

    def _has_free_row(self) -> bool:
        return any(row.holder is None for row in self._rows)

    def _who_gives_way(self, tenant: str) -> Sequence | None:
        """Return whose row a tenant gets where none is free: one of who has most, if that is more by two."""
        if self._has_free_row():
            return None
        held = self._held()
        richest = max(held, key=lambda each: (held[each], self._virtual[each]))
        if held[richest] < held.get(tenant, 0) + 2:
            return None
        # The youngest: it has the least to compute again when its turn comes back.
        return max((s for s in self.running if s.tenant == richest), key=lambda s: s.number)

    def _put_back(self, sequence: Sequence) -> None:
        """Take a running sequence's row away; it is the first of its tenant to get one again."""
        self._free(sequence)
        sequence.computed = 0
        self._waiting.setdefault(sequence.tenant, deque()).appendleft(sequence)

    def _place(self, sequence: Sequence, source: _Row | None, shared: int) -> list[Copy]:
        """Give a sequence a free row, with the beginning that it shares with another."""
        free = sorted((row for row in self._rows if row.holder is None), key=lambda row: (len(row.kept) > 0, row.freed))
        target = free[0]
        copies: list[Copy] = []
        if source is not None:
            # A row that would lose much more than it gives is copied from, as long as another can be had.
            whole = source.holder is None and (len(source.kept) <= 2 * shared or len(free) == 1)
            if whole:
                target = source
            elif target is not source:
                copies.append(Copy(source.index, target.index, shared))
        target.holder, target.tenant, target.kept = sequence, sequence.tenant, []
        sequence.row, sequence.computed = target.index, shared
        return copies

    def _best(self, sequence: Sequence) -> tuple[_Row | None, int]:
        """Return the row of the same tenant that shares the longest computed beginning, and its length in tokens."""
        best, length = None, 0
        for row in self._rows if self._reuse else ():
            if row.tenant == sequence.tenant:
                tokens, computed = row.known()
                # The last token is always computed: the scores of the next one come from it.
                shared = min(common_length(tokens, sequence.tokens), computed, len(sequence.tokens) - 1)
                if shared > length:
                    best, length = row, shared
        return best, length

    def _free(self, sequence: Sequence, *, forget: bool = False) -> None:
        row = next(row for row in self._rows if row.holder is sequence)
        row.kept = [] if forget or not self._reuse else sequence.tokens[: sequence.computed]
        row.holder, row.freed, sequence.row = None, self._step, None

    def _drop_empty_line(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]


def _by_row(sequence: Sequence) -> int:
    return -1 if sequence.row is None else sequence.row


def common_length(one: Tokens[int], other: Tokens[int]) -> int:
    """Return how many tokens two sequences share from the first on."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    # Slices are compared in C; a loop over tokens would take milliseconds for a full line of long prompts.
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
