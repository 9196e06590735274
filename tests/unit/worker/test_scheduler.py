"""The scheduler: slots, fair shares and prefix reuse, against a KV cache of plain lists."""

from collections.abc import Sequence as Tokens

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.types import BACKGROUND_PRIORITY
from app.worker.scheduling import slots as slots_module
from app.worker.scheduling.prefix_tree import BLOCK_TOKENS, PrefixTree
from app.worker.scheduling.schedule import (
    KVMove,
    PrefixCopy,
    PrefixRestore,
    PrefixSave,
    Schedule,
    ScheduledTokens,
    Sequence,
)
from app.worker.scheduling.scheduler import (
    BACKGROUND_INTERVAL,
    BACKGROUND_PREFILL_TOKENS,
    BACKGROUND_TOKENS,
    Scheduler,
)
from app.worker.scheduling.slots import SLOTS_AHEAD, common_prefix_length
from tests.examples import examples

VOCABULARY = 4
"""Few tokens, so that prefixes are shared by accident too."""


class Machine:
    """A scheduler with a model that only records, for each slot, the tokens whose keys it would contain."""

    def __init__(self, slots: int, *, prefix_reuse: bool = True, prefix_blocks: int = 0) -> None:
        self.scheduler = Scheduler(slots, prefix_reuse=prefix_reuse, prefix_blocks=prefix_blocks)
        self.blocks: list[list[int]] = [[] for _ in range(prefix_blocks)]
        self.block_owners: list[object] = [None] * prefix_blocks
        self.slots: list[list[int]] = [[] for _ in range(slots)]
        self.owners: list[object] = [None] * slots
        self.live: dict[int, Sequence] = {}
        self.computed = 0
        """Tokens put through the model so far."""
        self._last_id = 0

    def add(self, tokens: Tokens[int], tenant: str = "a", *, adapter: str | None = None, priority: int = 0) -> Sequence:
        self._last_id += 1
        sequence = Sequence(self._last_id, tenant, list(tokens), len(tokens), adapter=adapter, priority=priority)
        self.live[sequence.request_id] = sequence
        self.scheduler.add(sequence)
        return sequence

    def remove(self, request_id: int) -> None:
        del self.live[request_id]
        self.scheduler.remove(request_id)

    def step(self, prefill_tokens: int = 8, decode_width: int | None = None) -> Schedule:
        """Run one step as the runner would, checking that the prefixes it reuses are really there."""
        schedule = self.scheduler.schedule(prefill_tokens=prefill_tokens, decode_width=decode_width)
        for move in schedule.moves:
            self.move(move)
        for scheduled in schedule.tokens:
            sequence = scheduled.sequence
            slot = sequence.slot
            assert slot is not None
            if sequence.computed_tokens:
                assert sequence.cache_owner == self.owners[slot]
            computed = sequence.computed_tokens
            assert sequence.token_ids[:computed] == self.slots[slot][:computed]
            end = computed + scheduled.count
            self.slots[slot], self.owners[slot] = sequence.token_ids[:end], sequence.cache_owner
            self.computed += scheduled.count
        completed = [each.sequence for each in schedule.tokens if each.completes]
        self.scheduler.mark_computed(schedule.tokens)
        for sequence in completed:
            sequence.token_ids.append(sequence.request_id % VOCABULARY)
        return schedule

    def save_ahead(self, max_blocks: int = 1000) -> list[KVMove]:
        """Make the copies that the scheduler names while nothing runs, to their end."""
        moves = list[KVMove]()
        while (move := self.scheduler.save_ahead(max_blocks)) is not None:
            self.move(move)
            moves.append(move)
        return moves

    def move(self, move: KVMove) -> None:
        match move:
            case PrefixCopy(source, target, count):
                assert len(self.slots[source]) >= count
                self.slots[target], self.owners[target] = self.slots[source][:count], self.owners[source]
            case PrefixSave(slot, start, blocks):
                for number, block in enumerate(blocks):
                    begin = start + number * BLOCK_TOKENS
                    self.blocks[block] = self.slots[slot][begin : begin + BLOCK_TOKENS]
                    self.block_owners[block] = self.owners[slot]
                    assert (BLOCK_TOKENS == len(self.blocks[block])) or block == blocks[-1]
            case PrefixRestore(blocks, slot):
                assert 1 == len({self.block_owners[block] for block in blocks})
                self.slots[slot] = [token for block in blocks for token in self.blocks[block]]
                self.owners[slot] = self.block_owners[blocks[0]]

    def finish(self, sequence: Sequence, completion_tokens: int = 1) -> None:
        """Run until a sequence has so many completion tokens, then remove it."""
        while len(sequence.token_ids) < sequence.prompt_tokens + completion_tokens:
            self.step(prefill_tokens=1000)
        self.remove(sequence.request_id)


def ids_in(schedule: Schedule) -> list[int]:
    return [each.sequence.request_id for each in schedule.tokens]


def test_the_next_turn_prefills_only_what_is_new():
    """A prompt that begins with an earlier one and its completion starts where that ended."""
    machine = Machine(slots=2)
    first = machine.add(range(100))
    machine.finish(first, completion_tokens=20)
    before = machine.computed
    second = machine.add([*first.token_ids, 7, 8, 9])
    machine.finish(second)
    # The completion's last token was never computed.
    assert (119, 4) == (second.cached_tokens, machine.computed - before)


def test_several_samples_of_one_prompt_compute_it_once():
    """The others wait until the first has computed the prompt, and then copy it."""
    machine = Machine(slots=4)
    sequences = [machine.add(range(100)) for _ in range(3)]
    while any(sequence.uncomputed_tokens > 1 or len(sequence.token_ids) == 100 for sequence in sequences):
        machine.step(prefill_tokens=30)
    sampled = sum(len(sequence.token_ids) - 100 for sequence in sequences)
    # Of each copy one token is computed again: the next one is sampled from its logits.
    assert machine.computed <= 100 + 2 + sampled


def test_a_long_shared_prefix_stays_cached_while_slots_are_free():
    """Two different questions behind one system prompt both start from it."""
    machine = Machine(slots=4)
    system = list(range(200))
    machine.finish(machine.add([*system, *[1] * 300]))
    one, two = machine.add([*system, 2, 2]), machine.add([*system, 3, 3])
    machine.step()
    assert (200, 200) == (one.cached_tokens, two.cached_tokens)


@pytest.mark.parametrize(("reuse", "tenant"), [(True, "b"), (False, "a")])
def test_nothing_is_reused_for_another_tenant_or_when_it_is_off(reuse: bool, tenant: str):
    """The very same prompt is computed again."""
    machine = Machine(slots=2, prefix_reuse=reuse)
    machine.finish(machine.add(range(50), tenant="a"))
    again = machine.add(range(50), tenant=tenant)
    machine.finish(again)
    assert (0, 100) == (again.cached_tokens, machine.computed)


@pytest.mark.parametrize(("first", "second"), [(None, "poet"), ("poet", None), ("poet", "lawyer")])
def test_a_prefix_that_another_adapter_computed_is_not_reused(first: str | None, second: str | None):
    """Neither of a sequence that runs nor of one that has left its slot."""
    machine = Machine(2)
    machine.finish(machine.add(range(10), adapter=first))
    machine.add(range(10), adapter=first)
    machine.step(prefill_tokens=4)

    other = machine.add(range(10), adapter=second)
    machine.finish(other)

    assert 0 == other.cached_tokens


def test_the_lowest_priority_number_gets_the_next_slot():
    """Among the requests of one tenant and of all; within a priority, first come, first served."""
    machine = Machine(1)
    running = machine.add(range(4))
    machine.step()
    waiting = [
        machine.add(range(4), tenant, priority=priority)
        for tenant, priority in zip("aabba", (5, 0, 5, 0, 0), strict=True)
    ]
    started = []

    machine.remove(running.request_id)
    while any(each.slot is None for each in waiting if each.request_id in machine.live):
        started += [each.request_id for each in machine.step(prefill_tokens=100).started]
        machine.remove(started[-1])

    low, high = {waiting[0].request_id, waiting[2].request_id}, {waiting[i].request_id for i in (1, 3, 4)}
    assert high == set(started[:3])
    assert low >= set(started[3:])
    assert started.index(waiting[1].request_id) < started.index(waiting[4].request_id)


def test_one_tenants_hundred_requests_do_not_keep_another_waiting():
    """The newcomer gets a slot in the next step, though all were taken; the preempted sequence continues later."""
    machine = Machine(slots=4)
    crowd = [machine.add([n % VOCABULARY] * 5, tenant="a") for n in range(100)]
    for _ in range(3):
        machine.step()
    newcomer = machine.add([1, 2, 3], tenant="b")
    assert newcomer.request_id in ids_in(machine.step())
    assert newcomer.request_id in ids_in(machine.step())
    machine.remove(newcomer.request_id)
    for sequence in crowd:
        machine.finish(sequence, completion_tokens=2)


def test_who_loses_its_slot_is_the_least_urgent_and_waits_among_its_equals():
    """Neither a later nor a more urgent request of its tenant stands behind it for that."""
    machine = Machine(slots=3)
    late, later, urgent = (machine.add([n, n], tenant="a", priority=each) for n, each in enumerate((10, 10, 0)))
    machine.step(prefill_tokens=100)
    other = machine.add([3, 3], tenant="b", priority=10)
    machine.step(prefill_tokens=100)
    running = machine.scheduler.running
    waiting, last = machine.add([3, 1], tenant="a", priority=5), machine.add([3, 2], tenant="a", priority=10)
    for each in (other, late):
        machine.remove(each.request_id)
    machine.step(prefill_tokens=100)

    assert {late.request_id, urgent.request_id, other.request_id} == {each.request_id for each in running}
    assert {urgent.request_id, waiting.request_id, later.request_id} == {
        each.request_id for each in machine.scheduler.running
    }
    assert last.slot is None


def test_with_two_tenants_a_step_holds_a_fair_share_of_each():
    """The tenant with one sequence gets a token in every step; those of the other take turns."""
    machine = Machine(slots=6)
    many = [machine.add([1, 2], tenant="a") for _ in range(5)]
    one = machine.add([3, 1], tenant="b")
    for _ in range(3):
        machine.step(prefill_tokens=100, decode_width=2)
    before = len(one.token_ids), sum(len(sequence.token_ids) for sequence in many)
    for _ in range(10):
        machine.step(prefill_tokens=100, decode_width=2)
    assert (10, 10) == (len(one.token_ids) - before[0], sum(len(sequence.token_ids) for sequence in many) - before[1])
    assert 1 >= max(len(a.token_ids) for a in many) - min(len(a.token_ids) for a in many)


def test_tenants_with_as_much_to_do_each_are_not_made_to_take_turns():
    """A shorter step would make everybody wait for the next one."""
    machine = Machine(slots=6)
    sequences = [machine.add([1, 2], tenant=tenant) for tenant in "aaabbb"]
    machine.step(prefill_tokens=100)
    assert [sequence.request_id for sequence in sequences] == sorted(ids_in(machine.step(decode_width=4)))


def test_the_next_prompts_of_who_streams_more_take_one_step_in_three():
    """A step with a prompt in it is longer; two of three pass without one for the tenant with fewer streams."""
    machine = Machine(slots=4)
    first, second, other = machine.add([1]), machine.add([2]), machine.add([3], "b")
    machine.step()
    long = machine.add(list(range(64)))

    for _ in range(11):
        machine.step(prefill_tokens=16)
    assert (12, 12, 12) == tuple(len(each.token_ids) - each.prompt_tokens for each in (first, second, other))
    assert 64 == long.computed_tokens
    machine.remove(other.request_id)
    late = machine.add(list(range(100, 164)))
    for _ in range(4):
        machine.step(prefill_tokens=16)
    assert 64 == late.computed_tokens


def test_who_has_no_stream_yet_hardly_waits_for_the_prompts_of_others():
    """The first prompt of a tenant gets the budget of two steps in three, and the other's streams continue."""
    machine = Machine(slots=8)
    streams = [machine.add([number]) for number in range(4)]
    machine.step()
    mine, prompt = machine.add(list(range(64)), "b"), machine.add(list(range(100, 164)))

    for _ in range(4):
        machine.step(prefill_tokens=16)

    assert (48, 16) == (mine.computed_tokens, prompt.computed_tokens)
    assert [5] * 4 == [len(each.token_ids) - each.prompt_tokens for each in streams]


def test_pending_prefills_count_who_has_no_token_and_could_have_a_slot():
    """Unfinished prompts in slots, and as many waiting ones as slots are free."""
    machine = Machine(slots=3, prefix_reuse=False)
    for _ in range(5):
        machine.add([1] * 20)
    assert 3 == machine.scheduler.pending_prefills
    machine.step(prefill_tokens=20)
    assert 2 == machine.scheduler.pending_prefills
    machine.step(prefill_tokens=40)
    assert 0 == machine.scheduler.pending_prefills


def test_waiting_costs_nothing_while_no_slot_is_free(monkeypatch: pytest.MonkeyPatch):
    """Waiting prompts are compared with cached prefixes only once a slot is free."""
    machine = Machine(slots=1)
    machine.add([1, 2, 3])
    machine.step()
    machine.add([1, 2, 3, 0])
    monkeypatch.setattr(slots_module, "common_prefix_length", lambda *ids: pytest.fail("compared in vain"))
    assert [1] == ids_in(machine.step())


def test_a_long_prompt_is_prefilled_in_chunks_beside_decoding():
    """Each chunk has the size of the budget, and every step decodes the others' tokens too."""
    machine = Machine(slots=2)
    streaming = machine.add([1, 2])
    machine.step()
    long = machine.add(range(100))
    steps = 0
    while long.uncomputed_tokens > 1:
        schedule = machine.step(prefill_tokens=20)
        assert [1, 20] == [each.count for each in schedule.tokens]
        assert streaming.request_id == schedule.tokens[0].sequence.request_id
        steps += 1
    assert 5 == steps


def test_prompts_of_two_tenants_are_computed_in_turn():
    """The one who got less goes first, so a flood of prompts from one does not hold up the other's only one."""
    machine = Machine(slots=8, prefix_reuse=False)
    for _ in range(6):
        machine.add(range(200), tenant="a")
    machine.step(prefill_tokens=50)
    newcomer = machine.add(range(100), tenant="b")
    steps = 0
    while newcomer.uncomputed_tokens > 1:
        machine.step(prefill_tokens=50)
        steps += 1
    # Alone it takes two.
    assert 4 >= steps


def test_what_a_slot_loses_is_found_again():
    """Conversations that take turns in too few slots each start where they ended, though that is within a block."""
    machine = Machine(slots=2, prefix_blocks=1000)
    prompts = {name: [number, *range(100)] for number, name in enumerate("abcdef")}
    for turn in range(3):
        for name, tokens in prompts.items():
            sequence = machine.add(tokens, name)
            machine.finish(sequence, completion_tokens=20)
            # The completion's last token was never computed.
            assert sequence.cached_tokens == bool(turn) * (len(tokens) - 20)
            prompts[name] = [*sequence.token_ids, *[turn] * 19]


def finished(machine: Machine, *prompts: Tokens[int]) -> None:
    """Let a conversation after the other leave its tokens in a slot."""
    for prompt in prompts:
        machine.finish(machine.add(prompt))


def test_what_is_saved_ahead_need_not_be_saved_when_its_slot_is_needed():
    """In pieces, each block once; the conversation is found there afterwards."""
    machine, long = Machine(slots=2, prefix_blocks=1000), list(range(10 * BLOCK_TOKENS))
    finished(machine, long, [-1] * 5 * BLOCK_TOKENS)

    saved = machine.save_ahead(max_blocks=3)

    assert [(0, 3), (24, 3), (48, 3), (72, 1), (0, 3), (24, 2)] == [
        (move.start, len(move.blocks)) for move in saved if isinstance(move, PrefixSave)
    ]
    assert [] == machine.save_ahead()
    newcomer = machine.add([7] * 30)
    assert [] == machine.step().moves
    machine.finish(newcomer)
    again = machine.add([*long, 5])
    (move,) = machine.step().moves
    assert isinstance(move, PrefixRestore)
    assert len(long) == again.cached_tokens


def test_what_is_half_saved_is_saved_and_found_whole():
    """A sequence that arrives between two pieces has the rest saved before it takes the slot."""
    machine, long = Machine(slots=1, prefix_blocks=1000), list(range(10 * BLOCK_TOKENS))
    finished(machine, long)
    half = machine.scheduler.save_ahead(4)
    assert half is not None
    machine.move(half)

    machine.add([-1] * 5)
    (rest,) = machine.step().moves

    assert isinstance(rest, PrefixSave)
    assert (4 * BLOCK_TOKENS, 6) == (rest.start, len(rest.blocks))
    assert machine.scheduler.save_ahead(4) is None
    for request_id in tuple(machine.live):
        machine.remove(request_id)
    again = machine.add([*long, 5])
    machine.step()
    assert len(long) == again.cached_tokens


def test_nothing_is_saved_ahead_while_a_slot_holds_nothing_or_there_are_no_blocks():
    """The next sequence would take that slot, and no other loses its tokens."""
    empty, none = Machine(slots=2, prefix_blocks=1000), Machine(slots=1)
    finished(empty, range(50))
    finished(none, range(50))
    assert [] == [*empty.save_ahead(), *none.save_ahead()]


def test_nothing_is_saved_ahead_while_a_sequence_runs_or_waits():
    """What it leaves is saved when it has gone, behind what has been waiting for that."""
    machine = Machine(slots=2, prefix_blocks=1000)
    finished(machine, range(50), [-1] * 50)
    sequence = machine.add([-2] * 50)
    assert [] == machine.save_ahead()
    machine.step()
    assert [] == machine.save_ahead()
    machine.finish(sequence)
    assert [1, 0] == [move.slot for move in machine.save_ahead() if isinstance(move, PrefixSave)]
    finished(machine, [-3] * 50)
    assert [1] == [move.slot for move in machine.save_ahead() if isinstance(move, PrefixSave)]


def test_few_slots_are_saved_ahead_those_first_that_are_needed_first():
    """Of conversations in many slots; the next ones only when those have been taken."""
    machine = Machine(slots=SLOTS_AHEAD + 3, prefix_blocks=1000)
    finished(machine, *([-number] * 50 for number in range(1, SLOTS_AHEAD + 4)))
    order = [move.slot for move in machine.save_ahead() if isinstance(move, PrefixSave)]
    assert list(range(SLOTS_AHEAD)) == order
    finished(machine, range(50))
    assert [SLOTS_AHEAD] == [move.slot for move in machine.save_ahead() if isinstance(move, PrefixSave)]


def test_slots_that_do_not_fit_the_prefix_cache_take_no_blocks_from_each_other_for_ever():
    machine = Machine(slots=3, prefix_blocks=4)
    finished(machine, *([-number] * 50 for number in range(1, 4)))
    assert 6 >= len(machine.save_ahead(max_blocks=2))


def test_a_shared_beginning_is_computed_once_though_its_slots_were_needed():
    """All conversations of a tenant with one system prompt start behind it, and it is stored once."""
    machine, system = Machine(slots=1, prefix_blocks=20), list(range(10 * BLOCK_TOKENS))
    for number in range(8):
        sequence = machine.add([*system, *[number] * 40])
        machine.finish(sequence)
        assert sequence.cached_tokens >= len(system) * bool(number)
        machine.finish(machine.add([-number] * 30, "another"))


@pytest.mark.parametrize(("tenant", "adapter"), [("b", None), ("a", "poet")])
def test_the_prefix_cache_is_never_another_tenants_or_adapters(tenant: str, adapter: str | None):
    machine = Machine(slots=1, prefix_blocks=100)
    machine.finish(machine.add(range(100), "a"))
    machine.finish(machine.add(range(200, 300), "a"))
    other = machine.add(range(100), tenant, adapter=adapter)
    machine.finish(other)
    again = machine.add(range(100), "a")
    machine.finish(again)
    assert (0, 99) == (other.cached_tokens, again.cached_tokens)


def test_the_prefix_used_least_recently_makes_room():
    """From its end: what others begin with stays."""
    tree = PrefixTree(4)
    owner, long, other = ("a", None), list(range(3 * BLOCK_TOKENS)), [-1] * 2 * BLOCK_TOKENS
    tree.insert(owner, long)
    _, added = tree.insert(owner, other)
    assert (2, 2 * BLOCK_TOKENS, 4) == (len(added), tree.match(owner, long)[0], len(tree))
    assert (2 * BLOCK_TOKENS, added) == tree.match(owner, other)


def test_the_last_tokens_of_a_prefix_are_found_where_they_fill_no_block():
    """By whoever has all of them, and behind others that begin as they do."""
    tree, owner, first = PrefixTree(9), ("a", None), list(range(BLOCK_TOKENS))
    for tail in ([1, 2, 3], [1, 2], [7]):
        tree.insert(owner, [*first, *tail])
    counts = [tree.match(owner, [*first, *more])[0] - BLOCK_TOKENS for more in ([1, 2, 3, 4], [1, 2, 9], [1, 9], [7])]
    assert ([3, 2, 0, 1], 4) == (counts, len(tree))
    assert (BLOCK_TOKENS + 3, []) == tree.insert(owner, [*first, 1, 2, 3])
    start, added = tree.insert(owner, [*first, *range(1, 1 + BLOCK_TOKENS)])
    assert (BLOCK_TOKENS, 1) == (start, len(added))
    assert 2 * BLOCK_TOKENS == tree.match(owner, [*first, *range(1, 20)])[0]


def test_a_prefix_longer_than_all_blocks_is_stored_as_far_as_it_goes():
    tree = PrefixTree(3)
    tokens = list(range(10 * BLOCK_TOKENS))
    assert (0, 3) == (tree.insert(("a", None), tokens)[0], len(tree.match(("a", None), tokens)[1]))
    assert [] == tree.insert(("b", None), tokens, keep=tree.match(("a", None), tokens)[1])[1]


@pytest.mark.parametrize("shared", [0, 1, 2, 5, 63, 64])
def test_common_prefix_length_counts_the_shared_prefix(shared: int):
    """As a loop over the tokens would."""
    one = [1] * 64
    other = [1] * shared + [2] * (64 - shared)
    assert (shared, shared) == (common_prefix_length(one, other), common_prefix_length(other, one[: max(shared, 1)]))


class AnyOrder(RuleBasedStateMachine):
    """In any order of calls slots contain what sequences rely on, and all who wait are served in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(slots=3, prefix_blocks=5)

    @rule(
        tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60),
        tenant=st.sampled_from(["", "b", "c"]),
        priority=st.sampled_from([0, 0, BACKGROUND_PRIORITY]),
    )
    def add(self, tokens: list[int], tenant: str, priority: int) -> None:
        self.machine.add(tokens, tenant, priority=priority)

    @rule(data=st.data(), more=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9))
    @precondition(lambda self: self.machine.live)
    def continue_another(self, data: st.DataObject, more: list[int]) -> None:
        other = data.draw(st.sampled_from(sorted(self.machine.live.values(), key=lambda s: s.request_id)))
        self.machine.add([*other.token_ids, *more], other.tenant)

    @rule(data=st.data())
    @precondition(lambda self: self.machine.live)
    def remove(self, data: st.DataObject) -> None:
        self.machine.remove(data.draw(st.sampled_from(sorted(self.machine.live))))

    @rule(budget=st.integers(1, 40), decode_width=st.none() | st.integers(1, 3))
    def step(self, budget: int, decode_width: int | None) -> None:
        schedule = self.machine.step(budget, decode_width)
        counts = [each.count for each in schedule.tokens]
        assert bool(schedule.tokens) == bool(self.machine.live)
        assert len(set(ids_in(schedule))) == len(schedule.tokens)
        background = [each.count for each in schedule.tokens if each.sequence.is_background]
        assert sum(counts) - sum(background) <= budget + len(counts)
        assert sum(background) <= budget + len(counts) + BACKGROUND_TOKENS

    @rule(max_blocks=st.integers(1, 3))
    def save_blocks_ahead(self, max_blocks: int) -> None:
        move = self.machine.scheduler.save_ahead(max_blocks)
        assert move is None or not self.machine.live
        if move is not None:
            assert isinstance(move, PrefixSave)
            assert 0 < len(move.blocks) <= max_blocks
            self.machine.move(move)

    @invariant()
    def slots_have_one_sequence_each(self) -> None:
        slots = [-1 if sequence.slot is None else sequence.slot for sequence in self.machine.scheduler.running]
        assert -1 not in slots
        assert sorted(set(slots)) == slots
        assert set(self.machine.live) == {n for n in range(200) if n in self.machine.scheduler}

    def teardown(self) -> None:
        # The background may wait for all others.
        for sequence in sorted(self.machine.live.values(), key=lambda each: each.is_background):
            self.machine.finish(sequence, completion_tokens=len(sequence.token_ids) - sequence.prompt_tokens + 1)
        assert 0 == len(self.machine.scheduler)


AnyOrder.TestCase.settings = examples(60, stateful_step_count=40)
test_any_order = AnyOrder.TestCase


def test_the_background_takes_part_in_every_step_while_there_is_nothing_else():
    """It decodes as anything else does, with shorter chunks of prompts, so that whoever comes does not wait long."""
    machine = Machine(slots=4)
    sequences = [machine.add(range(200), tenant=name, priority=BACKGROUND_PRIORITY) for name in "abc"]
    first = machine.step(prefill_tokens=1000)
    assert BACKGROUND_PREFILL_TOKENS == sum(each.count for each in first.tokens)
    while any(sequence.uncomputed_tokens > 1 for sequence in sequences):
        machine.step(prefill_tokens=1000)
    assert [1, 2, 3] == ids_in(machine.step())


def test_beside_others_the_background_has_few_tokens_in_few_steps():
    """It goes on all the same, however long the others stay."""
    machine = Machine(slots=32)
    background = [machine.add(range(n, n + 40), "batch", priority=BACKGROUND_PRIORITY) for n in range(20)]
    for _ in range(20):
        machine.step(prefill_tokens=1000)
    before = [len(sequence.token_ids) for sequence in background]
    live = machine.add(range(10), "a")
    steps = [machine.step(prefill_tokens=1000) for _ in range(10 * BACKGROUND_INTERVAL)]
    beside = [sum(each.count for each in step.tokens if each.sequence is not live) for step in steps]
    assert all(live.request_id in ids_in(step) for step in steps)
    assert [BACKGROUND_TOKENS] * 10 == [count for count in beside if count]
    assert 10 * BACKGROUND_TOKENS == sum(len(each.token_ids) for each in background) - sum(before)


def test_the_background_does_not_count_among_those_who_share_a_step_with_a_live_request():
    """Its rows, its prompts and its tenant make no prompt of a live request come in smaller pieces."""
    machine = Machine(slots=4)
    for number in range(3):
        machine.add(range(number, number + 20), f"batch {number}", priority=BACKGROUND_PRIORITY)
    for _ in range(5):
        machine.step(prefill_tokens=1000)
    machine.add(range(60), "batch 0", priority=BACKGROUND_PRIORITY)
    counts = machine.scheduler
    assert (3, 3, 1) == (counts.tenants, counts.decoding, counts.pending_prefills)
    machine.add(range(30, 60), "a")
    assert (1, 0, 1) == (counts.tenants, counts.decoding, counts.pending_prefills)
    machine.step(prefill_tokens=1000)
    assert (1, 1, 0) == (counts.tenants, counts.decoding, counts.pending_prefills)


def test_a_live_request_gets_the_slot_of_one_of_the_background_at_once():
    """Which goes on where it was as soon as there is a slot again."""
    machine = Machine(slots=2)
    background = [machine.add(range(n, n + 20), "a", priority=BACKGROUND_PRIORITY) for n in range(2)]
    for _ in range(5):
        machine.step(prefill_tokens=1000)
    live = [machine.add(range(50, 60), "a"), machine.add(range(60, 70), "a")]
    assert {each.request_id for each in live} == set(ids_in(machine.step(prefill_tokens=1000)))
    waiting = machine.add(range(70, 80), "batch", priority=BACKGROUND_PRIORITY)
    for _ in range(2 * BACKGROUND_INTERVAL):
        machine.step(prefill_tokens=1000)
    assert [None] * 3 == [each.slot for each in (*background, waiting)]
    for each in live:
        machine.remove(each.request_id)
    machine.step(prefill_tokens=1000)
    assert 2 == sum(each.slot is not None for each in (*background, waiting))


def test_who_loses_its_slot_while_its_token_is_sampled_waits_for_it():
    """Also where another of the background would give up a slot to it in the same step."""
    machine = Machine(slots=4)
    many = [machine.add(range(n, n + 9), "a", priority=BACKGROUND_PRIORITY) for n in range(3)]
    loser = machine.add(range(30, 39), "b", priority=BACKGROUND_PRIORITY)
    machine.step(prefill_tokens=1000)
    for each in (*many, loser):
        machine.scheduler.mark_computed([ScheduledTokens(each, 1)])
        each.in_flight = 1

    machine.add(range(50, 59), "c")
    scheduled = machine.scheduler.schedule(prefill_tokens=1000).tokens

    assert loser.slot is None
    assert loser.request_id not in [each.sequence.request_id for each in scheduled]
    for each in (*many, loser):
        each.append(1)
    machine.scheduler.schedule(prefill_tokens=1000)
    assert loser.slot is not None


def test_prompts_of_the_background_are_computed_beside_others_too():
    """A chunk at a time, within what such a step may hold."""
    machine = Machine(slots=4)
    live = machine.add(range(10), "a")
    machine.step(prefill_tokens=1000)
    background = machine.add(range(100, 130), "batch", priority=BACKGROUND_PRIORITY)
    for _ in range(30 * BACKGROUND_INTERVAL):
        machine.step(prefill_tokens=1000)
    assert background.computed_tokens >= 30
    assert len(live.token_ids) > 30 * BACKGROUND_INTERVAL
