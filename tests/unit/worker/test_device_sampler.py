"""Sampling without the host gives the tokens that sampling with it gives, on whatever device; here on a processor."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.types import SamplingParams
from app.worker.execution.base import ExecutorUnavailableError
from app.worker.execution.graphs.cuda_graphs import CudaGraphs
from app.worker.sampling import device_sampler, sampling_graphs
from app.worker.sampling.device_sampler import DeviceSampler
from app.worker.sampling.generation_rules import GenerationRules
from app.worker.sampling.sampler import NO_TOKEN, NO_TOKEN_LEFT, Sampled, SamplingFailure, SequenceSampler, sample
from app.worker.sampling.sampling_graphs import ENTRIES, SamplingGraphs, Step
from app.worker.sampling.sampling_ops import uniform_number, uniform_numbers
from app.worker.sampling.sampling_step import Method, RowSettings, SampledRow
from tests.examples import examples
from tests.unit.worker.test_sampler import INF, NAN, ROWS, noise, row

VOCAB = 5000
SETTINGS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.4, 1.0, 1.7]), "seed": st.integers(0, 5)},
    optional={
        "top_k": st.sampled_from([1, 40, 300, 6000]),
        "top_p": st.sampled_from([1e-6, 0.3, 0.9, 0.999]),
        "min_p": st.sampled_from([0.02, 0.3]),
        "repetition_penalty": st.sampled_from([0.7, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.6]),
        "frequency_penalty": st.sampled_from([-0.4, 0.3]),
        "min_tokens": st.sampled_from([2, 4]),
        "logit_bias": st.just(((3, 6.0), (4, -9.0))),
        "logprobs": st.sampled_from([0, 4]),
    },
)


def called(step: Step) -> Step:
    """What a recorded step is where nothing is captured."""
    return step


class OnDevice:
    """Rows that are sampled without the host, each in another slot, one step behind which they are read."""

    def __init__(self, slots: int, vocab: int = VOCAB, *, recorded: bool = True) -> None:
        self.sampler = DeviceSampler(slots, vocab, "cpu")
        if recorded:
            self.sampler.record(called)

    def sample(self, scores: torch.Tensor, rows: dict[int, SequenceSampler]) -> list[Sampled | SamplingFailure]:
        """Sample until no row asks for more tokens."""
        found: dict[int, Sampled | SamplingFailure] = {}
        while left := [slot for slot in rows if slot not in found]:
            wanted = [SampledRow(slot, rows[slot], rows[slot].sampled_tokens) for slot in left]
            step = self.sampler.sample(scores[[list(rows).index(slot) for slot in left]], wanted)
            for slot, token, result in zip(left, step.tokens.tolist(), step.read(), strict=True):
                if result is not None:
                    found[slot] = result
                    assert token == (result.token if isinstance(result, Sampled) else 0)
        return [found[slot] for slot in rows]


@pytest.mark.parametrize("recorded", [False, True])
@examples(60)
@given(seed=st.integers(0, 2**32), settings=st.lists(SETTINGS, min_size=1, max_size=6), dtype=st.sampled_from("fb"))
def test_tokens_and_logprobs_are_those_of_the_host(
    recorded: bool, seed: int, settings: list[dict[str, Any]], dtype: str
) -> None:
    """In every step, while rows come, leave, pause, and take the slots of others."""
    source, device = random.Random(seed), OnDevice(len(settings), recorded=recorded)
    here, there = {}, {}
    for step in range(8):
        for slot, changes in enumerate(settings):
            if slot not in here or source.random() < 0.1:
                ends, prompt = (11, 7), [source.randrange(VOCAB) for _ in range(5)]
                here[slot], there[slot] = (row(VOCAB, prompt=prompt, ends=ends, **changes) for _ in range(2))
        slots = [slot for slot in here if source.random() < 0.8]
        source.shuffle(slots)
        scores = noise(len(slots), VOCAB, seed=seed + step)
        scores[:, :12] += 4
        if dtype == "b":
            scores = scores.bfloat16()

        expected = sample(scores, [here[slot] for slot in slots])
        found = device.sample(scores, {slot: there[slot] for slot in slots})

        assert expected == found
        for slot, result in zip(slots, expected, strict=True):
            assert isinstance(result, Sampled)
            here[slot].accept(result.token)
            there[slot].accept(result.token)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_tokens_follow_one_another_before_the_host_has_read_any(recorded: bool, by_row: bool) -> None:
    """Counts, penalties and random numbers go on on the device, whether or not the host says what it knows of rows."""
    scores = noise(len(ROWS), 10, VOCAB)
    scores[:, :, :12] += 4
    rows = [row(VOCAB, prompt=(1, 2), ends=(9,), **changes) for changes in ROWS]
    single = [row(VOCAB, prompt=(1, 2), ends=(9,), **changes) for changes in ROWS]
    device = OnDevice(len(ROWS), recorded=recorded).sampler
    for sampler in rows:
        sampler.sorted_width = VOCAB  # nothing has to be sampled again
    steps = [
        device.sample(scores[:, step], [SampledRow(slot, sampler, step) for slot, sampler in enumerate(rows)])
        if by_row or step % 4 == 0
        else device.sample_next(scores[:, step])
        for step in range(10)
    ]

    for step, found in enumerate(steps):
        expected = sample(scores[:, step], single)
        assert expected == found.read()
        for sampler, result in zip(single, expected, strict=True):
            assert isinstance(result, Sampled)
            sampler.accept(result.token)


class Counting:
    """Records steps, and counts how often one is replayed."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, step: Step) -> Step:
        def replay() -> None:
            self.replays += 1
            step()

        return replay


@pytest.mark.parametrize(
    ("changes", "replays"),
    [
        *((each, int(each.get("top_k", 0) < 256)) for each in ROWS),
        ({"temperature": 0.0, "logprobs": 3}, 1),
        ({"top_k": 40, "logit_bias": tuple((token, 1.0) for token in range(ENTRIES // 2))}, 1),
        ({"top_k": 40, "logit_bias": tuple((token, 1.0) for token in range(ENTRIES // 2 + 1))}, 0),
        ({"top_k": 300}, 0),
    ],
)
def test_steps_with_usual_settings_are_replayed(changes: dict[str, Any], replays: int) -> None:
    """Those that need more tokens sorted, or have more biases than there is room for, are launched as they are."""
    counting, device, scores = Counting(), DeviceSampler(3, VOCAB, "cpu"), 4 * noise(2, VOCAB)
    device.record(counting.record)
    counting.replays = 0
    rows = [row(VOCAB, prompt=(1, 2), ends=(9,), **changes) for _ in range(2)]

    found = device.sample(scores, [SampledRow(slot + 1, each, 0) for slot, each in enumerate(rows)]).read()

    assert sample(scores, rows) == found
    assert replays == counting.replays


def test_more_rows_than_are_recorded_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_graphs, "MAX_ROWS", 3)
    counting, device, scores = Counting(), DeviceSampler(4, VOCAB, "cpu"), noise(4, VOCAB)
    device.record(counting.record)
    counting.replays = 0
    rows = [row(VOCAB, seed=number) for number in range(4)]

    for count in (4, 3):
        found = device.sample(scores[:count], [SampledRow(slot, each, 0) for slot, each in enumerate(rows[:count])])
        assert sample(scores[:count], rows[:count]) == found.read()

    assert 1 == counting.replays


def test_a_step_of_prompts_alone_samples_nothing() -> None:
    found = OnDevice(2).sampler.sample(noise(1, VOCAB)[:0], [])

    assert (0, []) == (len(found.tokens), found.read())


def test_settings_are_written_only_when_rows_come_or_go(monkeypatch: pytest.MonkeyPatch) -> None:
    device, written = OnDevice(3).sampler, list[int]()
    write = SamplingGraphs.step

    def counted(self: SamplingGraphs, method: Method, settings: RowSettings) -> Any:
        written.append(len(settings.rows))
        return write(self, method, settings)

    monkeypatch.setattr(SamplingGraphs, "step", counted)
    rows = [row(VOCAB, seed=number) for number in range(3)]
    for step in range(4):
        device.sample(noise(3, VOCAB), [SampledRow(slot, each, step) for slot, each in enumerate(rows)])
    device.sample(noise(2, VOCAB), [SampledRow(slot, each, 4) for slot, each in enumerate(rows[:2])])
    device.sample_next(noise(2, VOCAB))

    assert [3, 2] == written


def test_what_samples_other_tokens_is_not_replayed() -> None:
    """A recorded step is tried when it is recorded; the sampler goes on without."""

    def record(step: Step) -> Step:
        steps.append(step)
        number = len(steps)
        return lambda: steps[min(number, len(steps) - 1)]()

    steps = list[Step]()
    device, sampler, scores = DeviceSampler(2, VOCAB, "cpu"), row(VOCAB), noise(1, VOCAB)

    with pytest.raises(ExecutorUnavailableError, match="tokens of 2 rows differ"):
        device.record(record)

    assert sample(scores, [sampler]) == device.sample(scores, [SampledRow(1, sampler, 0)]).read()


def test_a_step_that_fails_leaves_no_state_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go on from what the host knows of them."""
    device, scores = OnDevice(1).sampler, noise(1, VOCAB)
    one, other = (row(VOCAB, prompt=(1, 2), seed=3, presence_penalty=1.0) for _ in range(2))
    device.sample(scores, [SampledRow(0, one, 0)])
    with monkeypatch.context() as patched:
        patched.setattr(device_sampler, "pack_sampled", None)
        with pytest.raises(TypeError):
            device.sample_next(scores)

    (first,) = device.sample(scores, [SampledRow(0, one, 0)]).read()

    assert [first] == sample(scores, [other])


@pytest.mark.parametrize("top_p", [0.9, 0.999])
def test_a_row_that_needs_more_tokens_once_has_them_from_then_on(top_p: float) -> None:
    """All tokens are equally likely, so that no few of them are enough."""
    device, sampler, scores = OnDevice(1).sampler, row(VOCAB, top_p=top_p), torch.zeros(1, VOCAB)
    results = list[Sampled | SamplingFailure | None]()
    while not results or results[-1] is None:
        (result,) = device.sample(scores, [SampledRow(0, sampler, 0)]).read()
        results.append(result)

    assert [None, None] == results[:-1]
    assert [results[-1]] == sample(scores, [row(VOCAB, top_p=top_p)])
    sampler.accept(5)
    assert [None] != device.sample(scores, [SampledRow(0, sampler, 1)]).read()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("changes", [*ROWS, {"top_k": 5000}])
def test_scores_that_are_not_finite_end_their_row_alone(bad: float, changes: dict[str, Any]) -> None:
    scores = noise(3, VOCAB)
    scores[1, 9] = bad
    ordinary = [row(VOCAB), row(VOCAB, ends=(9,), **{"min_tokens": 1} | changes), row(VOCAB, seed=8)]

    found = OnDevice(3).sample(scores, dict(enumerate(ordinary)))

    assert NO_TOKEN == found[1]
    assert [found[0], found[2]] == sample(scores[[0, 2]], [ordinary[0], ordinary[2]])


def test_settings_that_rule_out_every_token_end_the_row() -> None:
    scores = torch.tensor([[1.0, -INF, 2.0], [1.0, -INF, 2.0]])
    rows = {0: row(3, ends=(0, 2), min_tokens=1), 1: row(3, ends=(0, 2), temperature=0.0)}

    assert [NO_TOKEN_LEFT, Sampled(2)] == OnDevice(2, 3).sample(scores, rows)


def test_a_models_rules_need_the_host() -> None:
    ruled = SequenceSampler(SamplingParams(max_tokens=5), (1,), (), 9, rules=GenerationRules(suppress_tokens=(3,)))

    assert not DeviceSampler.supports(ruled)
    assert DeviceSampler.supports(row(9))


@given(key=st.integers(-(2**63), 2**63 - 1), counter=st.integers(0, 2**40))
def test_random_numbers_of_the_device_are_those_of_the_host(key: int, counter: int) -> None:
    found = uniform_numbers(torch.tensor([key, key]), torch.tensor([counter, counter + 1])).tolist()

    assert [uniform_number(key, counter), uniform_number(key, counter + 1)] == found
    assert 0 <= found[0] < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
def test_captured_steps_sample_what_launched_ones_do() -> None:
    scores = noise(len(ROWS), VOCAB).cuda()
    rows = [row(VOCAB, prompt=(1, 2), ends=(9,), **changes) for changes in ROWS]
    launched, captured = (DeviceSampler(len(ROWS), VOCAB, "cuda") for _ in range(2))
    captured.record(CudaGraphs().record)
    found = [each.sample(scores, [SampledRow(*pair, 0) for pair in enumerate(rows)]) for each in (launched, captured)]
    found += [each.sample_next(scores) for each in (launched, captured)]

    assert found[0].read() == found[1].read()
    assert found[2].read() == found[3].read()
