"""The Triton kernel computes what masked attention does, of exactly the keys that each token sees."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from app.ipc.messages import TokenEvent
from app.worker.execution.base import AttentionSpec, ExecutorUnavailableError
from app.worker.execution.executor_selection import install_verified
from app.worker.execution.graphs.attention_choice import faster_by_length
from app.worker.execution.graphs.decode_attention import DecodeAttention, PassAttention
from app.worker.execution.graphs.graph_executor import GraphExecutor, powers_of_two
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import PackedBatch, Segment, StaticBatch
from app.worker.execution.torch.equivalence import torch_runner
from app.worker.scheduling.batching_runner import BatchingRunner
from tests.unit.worker.families import CONTEXT, FAMILIES, VOCABULARY, loaded, make
from tests.unit.worker.test_batching_runner import PROMPTS, completion_of, generate, run, submit

pytestmark = pytest.mark.triton

SLOTS, KV_HEADS, LENGTH = 5, 2, 70
LENGTHS = (1, 15, 16, 17, LENGTH)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DIGITS = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}


class Case:
    """Random keys and values, and a token in each of some slots."""

    def __init__(
        self,
        lengths: Sequence[int] = LENGTHS,
        *,
        group: int = 3,
        size: int = 16,
        value_size: int | None = None,
        length: int = LENGTH,
        dtype: torch.dtype = torch.float32,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        """Args: lengths: keys in each slot, its token's own included."""
        generator = torch.Generator().manual_seed(1)
        value_size = value_size or size

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.keys, self.values = (random(SLOTS, KV_HEADS, length, each) for each in (size, value_size))
        self.query = random(len(lengths), KV_HEADS * group, size)
        # Not in the order of the rows.
        segments = [Segment((2 * row + 1) % SLOTS, end - 1, [0]) for row, end in enumerate(lengths)]
        self.batch = PackedBatch(segments, [1] * len(lengths), torch.device("cpu"))
        self.spec = AttentionSpec(
            query_heads=KV_HEADS * group,
            kv_heads=KV_HEADS,
            key_size=size,
            value_size=value_size,
            dtypes=frozenset({dtype}),
            device="cpu",
            sliding_window=window,
            softcap=softcap,
        )
        self.scale = 1.3 / math.sqrt(size)

    def found(self, programs: int = 1) -> Tensor:
        """Return what the kernel computes."""
        return kernel(programs).attend(self.query, self.keys, self.values, self.batch, self.spec, self.scale)

    def expected(self) -> Tensor:
        """Return what masked attention computes of the same numbers with more digits."""
        query, keys, values = (each.to(DIGITS[each.dtype]) for each in (self.query, self.keys, self.values))
        masked = DecodeAttention(keys.shape[2], whole=False)
        return masked.attend(query, keys, values, self.batch, self.spec, self.scale)

    def check(self, programs: int = 1) -> None:
        """Compare each head by itself."""
        found, expected = self.found(programs), self.expected()
        assert self.query.dtype == found.dtype
        assert expected.shape == found.shape
        error = (found.to(expected.dtype) - expected).norm(dim=2) / expected.norm(dim=2)
        assert float(error.max()) <= TOLERANCE[self.query.dtype]


def kernel(programs: int = 1) -> PassAttention:
    from app.worker.execution.graphs.split_kv_attention import SplitKVAttention

    return SplitKVAttention(programs)


@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_heads_of_every_size_and_number(group: int, size: int) -> None:
    Case(group=group, size=size).check()


@pytest.mark.parametrize(("size", "value_size"), [(80, 64), (24, 128), (192, 128)])
def test_values_may_have_another_size_than_keys(size: int, value_size: int) -> None:
    Case(size=size, value_size=value_size).check()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 1, 16, 40, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_types_windows_and_soft_caps(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    Case(dtype=dtype, window=window, softcap=softcap).check()


@pytest.mark.parametrize("programs", [1, 100, 10_000])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_keys_of_a_row_may_be_divided_among_any_number_of_programs(
    programs: int, window: int | None, dtype: torch.dtype
) -> None:
    """Some parts of the shorter rows have no keys; each part of the longest has several blocks if there are few."""
    lengths = (1, 63, 64, 65, 1100)
    Case(lengths, length=1100, window=window, dtype=dtype).check(programs)


def test_one_program_may_read_all_keys_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is combined."""
    from app.worker.execution.graphs import split_kv_attention

    monkeypatch.setattr(split_kv_attention, "MIN_PARTS", 1)
    monkeypatch.setattr(split_kv_attention, "combine_parts", None)

    for dtype in TOLERANCE:
        Case((1, 64, 65, 200), length=200, dtype=dtype).check()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("programs", [1, 10_000])
def test_nothing_is_read_of_what_a_token_does_not_see(window: int | None, programs: int) -> None:
    """A NaN there would spoil what is read, even masked."""
    case = Case((1, 30, 170), length=200, window=window)
    expected = case.expected()
    seen = torch.zeros(SLOTS, 200, dtype=torch.bool)
    for segment in case.batch.segments:
        seen[segment.slot, max(0, segment.end - (window or 200)) : segment.end] = True
    for storage in (case.keys, case.values):
        storage.masked_fill_(~seen[:, None, :, None], float("nan"))

    assert torch.allclose(expected.float(), case.found(programs), atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN
def test_nan_of_one_slot_stays_there() -> None:
    case = Case()
    before = case.found()
    case.keys[case.batch.segments[2].slot, 1, 0] = float("nan")

    found = case.found()

    others, spoilt = [0, 1, 3, 4], found[2].view(KV_HEADS, 3, -1)
    assert torch.equal(before[others], found[others])
    assert torch.equal(before[2].view(KV_HEADS, 3, -1)[0], spoilt[0])
    assert bool(spoilt[1].isnan().all())


def test_rows_of_padding_compute_what_the_last_row_does() -> None:
    case = Case((5, 40, 40, 40))
    static = StaticBatch(4, torch.device("cpu"))
    static.load(case.batch.segments[:2])
    case.batch = static
    case.query[2:] = case.query[1]

    found = case.found()

    case.check()
    assert torch.equal(found[1:2].expand(3, -1, -1), found[1:])


def test_keys_and_queries_may_lie_in_another_order() -> None:
    """Tokens before heads, and queries cut from a larger tensor."""
    case = Case()
    expected = case.found()
    case.keys, case.values = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (case.keys, case.values))
    wide = torch.zeros(len(LENGTHS), 2 * KV_HEADS * 3, 40)
    wide[:, ::2, 8:24] = case.query
    case.query = wide[:, ::2, 8:24]
    assert torch.equal(expected, case.found())

    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(expected, case.found())


def test_slots_may_lie_beyond_what_32_bits_count() -> None:
    """Of numbers, in one layer."""
    case = Case((20, 20, 20), dtype=torch.float16)
    stride, last = 3 << 28, max(segment.slot for segment in case.batch.segments)
    assert stride * last > 1 << 31
    # One memory for both, of which next to nothing is touched.
    memory = torch.empty(stride * last + (1 << 20), dtype=torch.float16)
    case.keys = case.values = memory.as_strided((last + 1, KV_HEADS, LENGTH, 16), (stride, 1 << 12, 16, 1))
    for segment in case.batch.segments:
        case.keys[segment.slot] = torch.randn(KV_HEADS, LENGTH, 16)

    case.check()


def test_what_the_kernel_does_not_compute_is_refused() -> None:
    mixed = Case()
    mixed.keys = mixed.keys.half()
    with pytest.raises(ExecutorUnavailableError, match=r"does not compute torch.float16, torch.float32"):
        mixed.found()

    double = Case(dtype=torch.float64)
    with pytest.raises(ExecutorUnavailableError, match=r"does not compute torch.float64"):
        double.found()

    strided = Case()
    strided.values = strided.values.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ExecutorUnavailableError, match="one after the other"):
        strided.found()


def with_kernel(runner: ModelRunner) -> ModelRunner:
    """Let a runner decode in passes with the kernel, called where a GPU replays them."""

    def verify(found: Tensor, expected: Tensor) -> None:
        runner.verify_logits(found, expected, 1e-4)

    runner.reference_logits()
    by_length = dict.fromkeys(powers_of_two(1, runner.cache.slots), kernel())
    executor = GraphExecutor(
        runner.executor, runner.cache, lambda compute: compute, verify, min_keys=16, by_length=by_length
    )
    install_verified(runner, executor, 1e-4)
    return runner


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide also the keys of short sequences."""
    monkeypatch.setattr("app.worker.execution.graphs.split_kv_attention.MAX_BLOCK_KEYS", 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3", "phi3", "gpt neox"])
def test_passes_compute_the_logits_of_torch(family: str) -> None:
    """Sequences of very different lengths share a pass, with prompts and guesses beside them."""
    ids = [[(7 * row + 3 * place + 1) % VOCABULARY for place in range(CONTEXT)] for row in range(SLOTS)]
    one, other = (torch_runner(make(FAMILIES[family]), slots=SLOTS, length=CONTEXT) for _ in range(2))
    one.reference_logits()
    with_kernel(other)
    lengths = [40, 3, 20, 9, CONTEXT - 1]
    decodes = [Segment(row, end, ids[row][end : end + 1]) for row, end in enumerate(lengths)]
    guesses, prompt = Segment(3, 9, ids[3][9:13]), Segment(4, 0, ids[4][:7])
    for runner in (one, other):
        runner.forward([Segment(row, 0, ids[row][:end]) for row, end in enumerate(lengths)], [0] * SLOTS)

    for segments, wanted in [(decodes, [1] * 5), (decodes[1:4], [1, 0, 1]), ([*decodes[:2], guesses, prompt], [1] * 4)]:
        found, expected = (runner.forward(segments, wanted) for runner in (other, one))
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


def test_greedy_completions_are_those_of_generate() -> None:
    """Of keys that the passes themselves wrote, in layers with a window and without."""
    model = make(FAMILIES["gemma3"])
    expected = [generate(model, prompt) for prompt in PROMPTS]
    model_runner = with_kernel(torch_runner(model, slots=3, length=CONTEXT))
    runner, events = BatchingRunner(loaded(model), model_runner), list[TokenEvent]()

    for number, prompt in enumerate(PROMPTS):
        submit(runner, prompt, number)
        runner.step(events.extend)
    events += run(runner)

    assert "graphs" == runner.compiled
    assert expected == [completion_of(events, number) for number in range(len(PROMPTS))]


def test_the_trial_at_load_takes_the_kernel_for_equal(caplog: pytest.LogCaptureFixture) -> None:
    """It is timed afterwards; interpreted it is never the faster."""
    runner = torch_runner(make(FAMILIES["gemma3"]), slots=3, length=CONTEXT)
    runner.reference_logits()

    with caplog.at_level("INFO"):
        faster = faster_by_length(runner.cache, lambda compute: compute)

    assert not faster
    assert "attention by lengths is used for 0 of 3 sizes of passes" in caplog.text
