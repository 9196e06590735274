"""Continuous batching: decide which sequences take part in the next step, and in which KV cache slot.

Pure: decides from token ids and counts alone, without torch, threads, clocks or sampling.  The runner calls `schedule`,
computes the result, and reports it with `mark_computed`; sequences come with `add` and go with `remove` between steps.

Tenants share the model by start-time fair queueing (Goyal, Vin and Cheng 1996): each has a virtual time that grows with
the tokens computed for it, the lowest goes first, and a tenant that comes back starts at the lowest of those present.

Sequences of the background take part in every step only while there are no others.  Beside others they do in one step
of several, with few tokens, and give up their slots to them.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from app.worker.scheduling.schedule import (
    UNLIMITED_SCORING,
    KVMove,
    Schedule,
    ScheduledTokens,
    ScoringBudget,
    Sequence,
)
from app.worker.scheduling.slots import Slots, common_prefix_length

MIN_SHARED_PREFIX = 32
"""Waiting for another sequence to compute a shared prefix pays from this many tokens on."""
MIN_PREFILL_CHUNK = 16
"""A smaller chunk of a long prompt is not worth a place in a step."""
PREFILL_INTERVAL = 3
"""A tenant that decodes more sequences than another has its prompts computed only in every so many steps."""
BACKGROUND_INTERVAL = 10
"""Beside others the background takes part in one of so many steps."""
BACKGROUND_TOKENS = 4
"""Tokens of it that such a step may hold however few the others have in it."""
BACKGROUND_PREFILL_TOKENS = 128
"""Prompt tokens of a step that holds nothing else: whoever comes meanwhile waits for its end."""


class Scheduler:
    """Holds the waiting queues, the KV cache slots and the tenants' shares."""

    def __init__(self, slots: int, *, prefix_reuse: bool = True, prefix_blocks: int = 0) -> None:
        """Args:
        slots: sequences that can be in the KV cache at once, >= 1.
        prefix_reuse: whether a sequence may start from what another of its tenant and adapter left or is computing.
        prefix_blocks: blocks of the prefix cache, for what slots that are needed again would lose.
        """
        self._slots = Slots(slots, prefix_reuse=prefix_reuse, prefix_blocks=prefix_blocks)
        self._prefix_reuse = prefix_reuse
        self._sequences: dict[int, Sequence] = {}
        self._waiting: dict[str, deque[Sequence]] = {}
        self._virtual_time: dict[str, float] = {}
        """The entries of tenants that have sequences now."""
        self._step = 0
        self.preemptions = 0
        """How often a sequence has lost its slot so far, to go on later."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._sequences

    @property
    def tenants(self) -> int:
        """How many tenants have sequences, those of the background apart where there are others."""
        return len({sequence.tenant for sequence in self._foreground})

    @property
    def pending_prefills(self) -> int:
        """How many sequences have a slot, or could get one, and not all of their prompt computed.

        Here too, and in `decoding`, the background counts only while there is nothing else.
        """
        sequences = self._foreground
        unfinished = sum(s.slot is not None and s.uncomputed_tokens > 1 for s in sequences)
        taken = sum(s.slot is not None for s in sequences)
        return unfinished + min(self._slots.count - taken, len(sequences) - taken)

    @property
    def decoding(self) -> int:
        """How many sequences have their prompt computed."""
        return sum(s.slot is not None and s.uncomputed_tokens == 1 for s in self._foreground)

    @property
    def _foreground(self) -> list[Sequence]:
        sequences = list(self._sequences.values())
        return [sequence for sequence in sequences if not sequence.is_background] or sequences

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have slots, by slot."""
        return self._slots.running

    def add(self, sequence: Sequence) -> None:
        """Append a sequence to its tenant's waiting queue, behind those of the same priority."""
        self._sequences[sequence.request_id] = sequence
        if sequence.tenant not in self._virtual_time:
            self._virtual_time[sequence.tenant] = min(self._virtual_time.values(), default=0.0)
        queue = self._waiting.setdefault(sequence.tenant, deque())
        queue.insert(sum(other.priority <= sequence.priority for other in queue), sequence)

    def remove(self, request_id: int, *, discard: bool = False) -> Sequence | None:
        """Remove a sequence, waiting or running, and free its slot.  Returns None if there is no such sequence.

        Args: discard: whether what it computed must not be reused.
        """
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        if sequence.slot is None:
            self._waiting[sequence.tenant].remove(sequence)
            self._drop_empty_queue(sequence.tenant)
        else:
            self._slots.release(sequence, step=self._step, discard=discard)
        if all(other.tenant != sequence.tenant for other in self._sequences.values()):
            del self._virtual_time[sequence.tenant]
        return sequence

    def schedule(
        self,
        *,
        prefill_tokens: int,
        decode_width: int | None = None,
        scoring: ScoringBudget = UNLIMITED_SCORING,
        background_tokens: int = BACKGROUND_TOKENS,
    ) -> Schedule:
        """Assign free slots and choose what the next step computes.

        Args:
            prefill_tokens: how many prompt tokens the step may hold beside the decode tokens, >= 1.
            decode_width: bound on decode tokens where one tenant has many and another few; None is no limit.
            scoring: bound on prompt tokens whose logits are all needed.
            background_tokens: bound on tokens of the background beside others, of prompts and of completions.
        """
        self._step += 1
        moves, started = self._admit()
        running = self.running
        chosen = [sequence for sequence in running if not sequence.is_background]
        if not chosen:
            chosen, prefill_tokens = running, min(prefill_tokens, BACKGROUND_PREFILL_TOKENS)
        decodes, ahead = self._decodes(chosen, decode_width)
        paused = ahead if self._step % PREFILL_INTERVAL else ()
        chunks = list(self._prefill_chunks([s for s in chosen if s.tenant not in paused], prefill_tokens, scoring))
        if len(chosen) < len(running) and self._step % BACKGROUND_INTERVAL == 0:
            budget = min(background_tokens, max(BACKGROUND_TOKENS, len(decodes) + sum(each.count for each in chunks)))
            background = sorted((s for s in running if s.is_background), key=lambda s: s.last_step)
            beside = [sequence for sequence in background if sequence.uncomputed_tokens == 1][:budget]
            scored = sum(each.count for each in chunks if each.sequence.is_scoring)
            left = replace(scoring, max_tokens=scoring.max_tokens - scored)
            decodes += beside
            if len(beside) < budget:
                chunks += self._prefill_chunks(background, budget - len(beside), left)
        tokens = [ScheduledTokens(sequence, 1) for sequence in sorted(decodes, key=_slot_of)]
        return Schedule(tokens + chunks, moves, started)

    def save_ahead(self, max_blocks: int) -> KVMove | None:
        """Return a copy that a later sequence would have to wait for, while there are none; None if there is no more.

        Args: max_blocks: of the prefix cache, that it writes at most.
        """
        return None if self._sequences else self._slots.save_ahead(max_blocks)

    def mark_computed(self, computed: Iterable[ScheduledTokens]) -> None:
        """Record that these tokens of a schedule have been computed."""
        for scheduled in computed:
            sequence = scheduled.sequence
            sequence.computed_tokens += scheduled.count
            sequence.last_step = self._step
            if sequence.tenant in self._virtual_time:
                self._virtual_time[sequence.tenant] += scheduled.count

    def _decodes(self, sequences: Collection[Sequence], width: int | None) -> tuple[list[Sequence], set[str]]:
        """Choose the sequences that decode a token, least recently computed first.

        Returns: them, and the tenants that decode more sequences than another.
        """
        queues: dict[str, deque[Sequence]] = {}
        for sequence in sorted((s for s in sequences if s.uncomputed_tokens == 1), key=lambda s: s.last_step):
            queues.setdefault(sequence.tenant, deque()).append(sequence)
        fewest = min((len(queues.get(tenant, ())) for tenant in {s.tenant for s in sequences}), default=0)
        ahead = {tenant for tenant, queue in queues.items() if len(queue) > fewest}
        # Where all have more than an equal share, a shorter step would only make all of them wait for their turns.
        limited = width is not None and ahead and fewest * len(queues) <= width
        return self._select_decodes(queues, width if limited else None), ahead

    def _select_decodes(self, queues: Mapping[str, deque[Sequence]], width: int | None) -> list[Sequence]:
        """Choose up to `width` sequences round-robin over the tenants; all where there is no limit."""
        available = sum(map(len, queues.values()))
        limit = available if width is None else min(width, available)
        selected: list[Sequence] = []
        while len(selected) < limit:
            for queue in queues.values():
                if queue and len(selected) < limit:
                    selected.append(queue.popleft())
        return selected

    def _prefill_chunks(
        self, sequences: Collection[Sequence], budget: float, scoring: ScoringBudget
    ) -> Iterator[ScheduledTokens]:
        """Spend the budget on the tenants with the lowest virtual time first, a whole prompt at a time if it fits."""
        scored = scoring.max_tokens
        unfinished = [s for s in sequences if s.uncomputed_tokens > 1]
        for sequence in sorted(unfinished, key=lambda s: (self._virtual_time[s.tenant], s.request_id)):
            cost = scoring.token_cost if sequence.is_scoring else 1
            count = min(sequence.uncomputed_tokens, max(1, int(budget / cost)))
            if sequence.is_scoring:
                count = min(count, scored)
                scored -= count
            if count:
                yield ScheduledTokens(sequence, count)
            budget -= count * cost
            if budget < MIN_PREFILL_CHUNK:
                return

    def _admit(self) -> tuple[list[KVMove], list[Sequence]]:
        """Move waiting sequences into slots, preempting where a tenant has too many."""
        moves: list[KVMove] = []
        started: list[Sequence] = []
        skipped: set[str] = set()
        while (tenant := self._next_tenant(skipped)) is not None:
            sequence, victim = self._waiting[tenant][0], self._preemption_victim(tenant)
            if victim is None and not self._slots.free:
                skipped.add(tenant)
                continue
            prefix = self._slots.longest_prefix(sequence)
            # One that has lost its slot while a token was in flight goes on when that is known.
            if sequence.in_flight or self._should_wait(sequence, prefix.count):
                skipped.add(tenant)
                continue
            if victim is not None:
                self._preempt(victim)
            self._waiting[tenant].popleft()
            self._drop_empty_queue(tenant)
            moves += self._slots.start(sequence, prefix)
            if not sequence.started:
                sequence.started = True
                sequence.cached_tokens = sequence.computed_tokens
                started.append(sequence)
        return moves, started

    def _next_tenant(self, skipped: set[str]) -> str | None:
        """Return the tenant that gets the next slot: by its first priority, then fewest slots, then virtual time."""
        slots = Counter(sequence.tenant for sequence in self.running)
        waiting = [tenant for tenant in self._waiting if tenant not in skipped]
        return min(
            waiting,
            key=lambda t: (
                self._waiting[t][0].priority,
                slots[t],
                self._virtual_time[t],
                self._waiting[t][0].request_id,
            ),
            default=None,
        )

    def _should_wait(self, sequence: Sequence, cached: int) -> bool:
        """Return whether a running sequence is computing more of a shared prefix than is cached, to be copied soon."""
        if not self._prefix_reuse:
            return False
        reusable = sequence.reusable_tokens
        for other in self.running:
            if other.cache_owner != sequence.cache_owner or other.uncomputed_tokens <= 1:
                continue
            shared = min(common_prefix_length(other.token_ids, sequence.token_ids), reusable)
            gain = shared - cached
            if gain >= MIN_SHARED_PREFIX or (gain > 0 and shared == reusable):
                return True
        return False

    def _preemption_victim(self, tenant: str) -> Sequence | None:
        """Return whose slot a tenant gets where none is free: one of the tenant with most, if it has two more.

        A sequence of the background gives its slot to any other, and gets none of theirs.
        """
        if self._slots.free:
            return None
        background = [s for s in self.running if s.is_background]
        if not self._waiting[tenant][0].is_background and background:
            return max(background, key=lambda s: s.request_id)
        preemptible = background if self._waiting[tenant][0].is_background else self.running
        slots = Counter(s.tenant for s in preemptible)
        richest = max(slots, key=lambda each: (slots[each], self._virtual_time[each]), default=None)
        if richest is None or slots[richest] < slots[tenant] + 2:
            return None
        # The youngest of the least urgent: it has the least to compute again when its turn comes back.
        return max((s for s in preemptible if s.tenant == richest), key=lambda s: (s.priority, s.request_id))

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's slot away; it is the first of its tenant and priority to get one again."""
        self._slots.release(sequence, step=self._step)
        self.preemptions += 1
        sequence.computed_tokens = 0
        queue = self._waiting.setdefault(sequence.tenant, deque())
        queue.insert(sum(other.priority < sequence.priority for other in queue), sequence)

    def _drop_empty_queue(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]


def _slot_of(sequence: Sequence) -> int:
    return -1 if sequence.slot is None else sequence.slot
