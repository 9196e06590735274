"""The scheduler: rows, shares and reuse, against a KV cache made of plain lists."""

from collections.abc import Sequence as Tokens

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.worker.scheduling.schedule import Plan, Sequence
from app.worker.scheduling.scheduler import Scheduler, common_length

VOCABULARY = 4
"""Few tokens, so that beginnings are shared by accident too."""


class Machine:
    """A scheduler with a model that does nothing but keep, for each row, the tokens whose keys it would hold."""

    def __init__(self, rows: int, *, reuse: bool = True) -> None:
        self.scheduler = Scheduler(rows, reuse=reuse)
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.owners = [""] * rows
        self.live: dict[int, Sequence] = {}
        self.computed = 0
        """Tokens put through the model so far."""
        self._numbers = 0

    def add(self, tokens: Tokens[int], tenant: str = "a") -> Sequence:
        self._numbers += 1
        sequence = Sequence(self._numbers, tenant, list(tokens), len(tokens))
        self.live[sequence.number] = sequence
        self.scheduler.add(sequence)
        return sequence

    def remove(self, number: int) -> None:
        del self.live[number]
        self.scheduler.remove(number)

    def step(self, prompt_tokens: int = 8, width: int | None = None) -> Plan:
        """Run one step as the runner would, checking that what it is told to use is really there."""
        plan = self.scheduler.plan(prompt_tokens=prompt_tokens, width=width)
        for copy in plan.copies:
            assert len(self.rows[copy.source]) >= copy.count
            self.rows[copy.target] = self.rows[copy.source][: copy.count]
            self.owners[copy.target] = self.owners[copy.source]
        for work in plan.work:
            sequence = work.sequence
            row = sequence.row
            assert row is not None
            if sequence.computed:
                assert sequence.tenant == self.owners[row]
            assert sequence.tokens[: sequence.computed] == self.rows[row][: sequence.computed]
            done = sequence.computed + work.count
            self.rows[row], self.owners[row] = sequence.tokens[:done], sequence.tenant
            self.computed += work.count
        completed = [work.sequence for work in plan.work if work.completes]
        self.scheduler.computed(plan.work)
        for sequence in completed:
            sequence.tokens.append(sequence.number % VOCABULARY)
        return plan

    def finish(self, sequence: Sequence, answer_tokens: int = 1) -> None:
        """Run until a sequence has so many tokens of answer, then end it."""
        while len(sequence.tokens) < sequence.prompt_tokens + answer_tokens:
            self.step(prompt_tokens=1000)
        self.remove(sequence.number)


def numbers_in(plan: Plan) -> list[int]:
    return [work.sequence.number for work in plan.work]


def test_the_next_turn_computes_only_what_is_new():
    """A prompt that begins with an earlier one and its answer starts where that ended."""
    machine = Machine(rows=2)
    first = machine.add(range(100))
    machine.finish(first, answer_tokens=20)
    before = machine.computed
    second = machine.add([*first.tokens, 7, 8, 9])
    machine.finish(second)
    # The answer's last token was never put through the model.
    assert (119, 4) == (second.reused, machine.computed - before)


def test_several_answers_to_one_prompt_compute_it_once():
    """The others wait until the first has computed the prompt, and then copy it."""
    machine = Machine(rows=4)
    answers = [machine.add(range(100)) for _ in range(3)]
    while any(answer.left > 1 or len(answer.tokens) == 100 for answer in answers):
        machine.step(prompt_tokens=30)
    made = sum(len(answer.tokens) - 100 for answer in answers)
    # Of each copy one token is computed again: the scores of the next come from it.
    assert machine.computed <= 100 + 2 + made


def test_a_long_shared_beginning_is_kept_while_rows_are_free():
    """Two different questions behind one system prompt both start from it."""
    machine = Machine(rows=4)
    system = list(range(200))
    machine.finish(machine.add([*system, *[1] * 300]))
    one, two = machine.add([*system, 2, 2]), machine.add([*system, 3, 3])
    machine.step()
    assert (200, 200) == (one.reused, two.reused)


@pytest.mark.parametrize(("reuse", "tenant"), [(True, "b"), (False, "a")])
def test_nothing_is_reused_for_another_tenant_or_when_it_is_off(reuse: bool, tenant: str):
    """The very same prompt is computed again."""
    machine = Machine(rows=2, reuse=reuse)
    machine.finish(machine.add(range(50), tenant="a"))
    again = machine.add(range(50), tenant=tenant)
    machine.finish(again)
    assert (0, 100) == (again.reused, machine.computed)


def test_one_tenants_hundred_requests_do_not_keep_another_waiting():
    """The newcomer gets a row in the next step, though all were taken; the one that lost its row goes on later."""
    machine = Machine(rows=4)
    crowd = [machine.add([n % VOCABULARY] * 5, tenant="a") for n in range(100)]
    for _ in range(3):
        machine.step()
    newcomer = machine.add([1, 2, 3], tenant="b")
    assert newcomer.number in numbers_in(machine.step())
    assert newcomer.number in numbers_in(machine.step())
    machine.remove(newcomer.number)
    for answer in crowd:
        machine.finish(answer, answer_tokens=2)


def test_with_two_tenants_a_step_holds_a_fair_share_of_each():
    """The tenant with one answer gets a token in every step; those of the other take turns."""
    machine = Machine(rows=6)
    many = [machine.add([1, 2], tenant="a") for _ in range(5)]
    one = machine.add([3, 1], tenant="b")
    for _ in range(3):
        machine.step(prompt_tokens=100, width=2)
    before = len(one.tokens), sum(len(answer.tokens) for answer in many)
    for _ in range(10):
        machine.step(prompt_tokens=100, width=2)
    assert (10, 10) == (len(one.tokens) - before[0], sum(len(answer.tokens) for answer in many) - before[1])
    assert 1 >= max(len(a.tokens) for a in many) - min(len(a.tokens) for a in many)


def test_tenants_with_as_much_to_do_each_are_not_made_to_take_turns():
    """A shorter step would make everybody wait for the next one."""
    machine = Machine(rows=6)
    answers = [machine.add([1, 2], tenant=tenant) for tenant in "aaabbb"]
    machine.step(prompt_tokens=100)
    assert [answer.number for answer in answers] == sorted(numbers_in(machine.step(width=4)))


def test_the_next_prompts_of_who_streams_more_take_one_step_in_three():
    """A step with a prompt in it is longer; two of three pass without one for the tenant with fewer streams."""
    machine = Machine(rows=4)
    first, second, other = machine.add([1]), machine.add([2]), machine.add([3], "b")
    machine.step()
    long = machine.add(list(range(64)))

    for _ in range(11):
        machine.step(prompt_tokens=16)
    assert (12, 12, 12) == tuple(len(each.tokens) - each.prompt_tokens for each in (first, second, other))
    assert 64 == long.computed
    machine.remove(other.number)
    late = machine.add(list(range(100, 164)))
    for _ in range(4):
        machine.step(prompt_tokens=16)
    assert 64 == late.computed


def test_who_has_no_stream_yet_hardly_waits_for_the_prompts_of_others():
    """The first prompt of a tenant gets the budget of two steps in three, and the other's streams go on."""
    machine = Machine(rows=8)
    streams = [machine.add([number]) for number in range(4)]
    machine.step()
    mine, prompt = machine.add(list(range(64)), "b"), machine.add(list(range(100, 164)))

    for _ in range(4):
        machine.step(prompt_tokens=16)

    assert (48, 16) == (mine.computed, prompt.computed)
    assert [5] * 4 == [len(each.tokens) - each.prompt_tokens for each in streams]


def test_starting_counts_who_has_no_token_and_could_have_a_row():
    """Unfinished prompts in rows, and as many from the line as rows are free."""
    machine = Machine(rows=3, reuse=False)
    for _ in range(5):
        machine.add([1] * 20)
    assert 3 == machine.scheduler.starting
    machine.step(prompt_tokens=20)
    assert 2 == machine.scheduler.starting
    machine.step(prompt_tokens=40)
    assert 0 == machine.scheduler.starting


def test_the_line_costs_nothing_while_no_row_is_free(monkeypatch: pytest.MonkeyPatch):
    """Who waits is compared with what the rows hold only once one can be had."""
    machine = Machine(rows=1)
    machine.add([1, 2, 3])
    machine.step()
    machine.add([1, 2, 3, 0])
    monkeypatch.setattr(Scheduler, "_best", lambda self, sequence: pytest.fail("compared in vain"))
    assert [1] == numbers_in(machine.step())


def test_a_long_prompt_leaves_room_for_those_who_stream():
    """It is computed in pieces of the step's budget, and every step holds the others' tokens too."""
    machine = Machine(rows=2)
    streaming = machine.add([1, 2])
    machine.step()
    long = machine.add(range(100))
    steps = 0
    while long.left > 1:
        plan = machine.step(prompt_tokens=20)
        assert [1, 20] == [work.count for work in plan.work]
        assert streaming.number == plan.work[0].sequence.number
        steps += 1
    assert 5 == steps


def test_prompts_of_two_tenants_are_computed_in_turn():
    """The one who got less goes first, so a flood of prompts from one does not hold up the other's only one."""
    machine = Machine(rows=8, reuse=False)
    for _ in range(6):
        machine.add(range(200), tenant="a")
    machine.step(prompt_tokens=50)
    newcomer = machine.add(range(100), tenant="b")
    steps = 0
    while newcomer.left > 1:
        machine.step(prompt_tokens=50)
        steps += 1
    # Alone it takes two.
    assert 4 >= steps


@pytest.mark.parametrize("shared", [0, 1, 2, 5, 63, 64])
def test_common_length_counts_the_shared_beginning(shared: int):
    """As a loop over the tokens would."""
    one = [1] * 64
    other = [1] * shared + [2] * (64 - shared)
    assert (shared, shared) == (common_length(one, other), common_length(other, one[: max(shared, 1)]))


class AnyOrder(RuleBasedStateMachine):
    """Whatever comes in whatever order, rows hold what sequences rely on, and all who wait are served in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(rows=3)

    @rule(
        tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60),
        tenant=st.sampled_from(["", "b", "c"]),
    )
    def add(self, tokens: list[int], tenant: str) -> None:
        self.machine.add(tokens, tenant)

    @rule(data=st.data(), more=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9))
    @precondition(lambda self: self.machine.live)
    def go_on_from_another(self, data: st.DataObject, more: list[int]) -> None:
        other = data.draw(st.sampled_from(sorted(self.machine.live.values(), key=lambda s: s.number)))
        self.machine.add([*other.tokens, *more], other.tenant)

    @rule(data=st.data())
    @precondition(lambda self: self.machine.live)
    def remove(self, data: st.DataObject) -> None:
        self.machine.remove(data.draw(st.sampled_from(sorted(self.machine.live))))

    @rule(budget=st.integers(1, 40), width=st.none() | st.integers(1, 3))
    def step(self, budget: int, width: int | None) -> None:
        plan = self.machine.step(budget, width)
        counts = [work.count for work in plan.work]
        assert bool(plan.work) == bool(self.machine.live)
        assert len(set(numbers_in(plan))) == len(plan.work)
        assert sum(counts) <= budget + len(counts)

    @invariant()
    def rows_are_held_by_one_each(self) -> None:
        rows = [sequence.row for sequence in self.machine.scheduler.running]
        assert sorted(set(rows)) == rows
        assert set(self.machine.live) == {n for n in range(200) if n in self.machine.scheduler}

    def teardown(self) -> None:
        for sequence in list(self.machine.live.values()):
            self.machine.finish(sequence, answer_tokens=len(sequence.tokens) - sequence.prompt_tokens + 1)
        assert 0 == len(self.machine.scheduler)


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_order = AnyOrder.TestCase
