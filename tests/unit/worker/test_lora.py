"""LoRA adapters: each request gets what PEFT's merged model says, whatever the others in its batch have."""

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.ipc.messages import Compile, Submit, TokenEvent
from app.types import SamplingParams
from app.worker.execution.compiled.torch_compile import TorchCompileExecutor
from app.worker.execution.executor_selection import install_verified, select_executor
from app.worker.execution.lora import LoraAdapter, LoraWeights
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.native.native_executors import NativeDecoderExecutor
from app.worker.execution.packed_batch import Segment
from app.worker.execution.quantization import quantize_linears
from app.worker.execution.torch.int8_linear import int8_linear
from app.worker.execution.torch.torch_executor import create_torch_runner
from tests.unit.worker.families import CONTEXT, FAMILIES, VOCABULARY, make
from tests.unit.worker.lora_adapters import ATTENTION, MLP, adapted, read, save_adapter
from tests.unit.worker.test_batching_runner import NEW, PROMPTS, completion_of, ending_of, generate, run, runner_for
from tests.unit.worker.test_native_decoder import KINDS

pytestmark = pytest.mark.usefixtures("compiler")

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gemma3": [*ATTENTION, *MLP],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt neox": ["query_key_value", "dense", "dense_4h_to_h"],
}
IDS = [[(7 * row + 3 * place + 1) % VOCABULARY for place in range(CONTEXT)] for row in range(6)]


def model_runner(model: Any, setting: Compile = "none", slots: int = 6) -> ModelRunner:
    runner = create_torch_runner(model, length=CONTEXT, slots=slots, free_bytes=10**9)
    select_executor(runner, setting)
    return runner


@torch.inference_mode()
def scores(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return what an ordinary forward pass makes of the token after these."""
    model.set_attn_implementation("eager")
    logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits


def mixed_passes(
    runner: ModelRunner, adapters: Sequence[LoraAdapter | None], rows: Sequence[int] = range(6)
) -> list[tuple[int, int, torch.Tensor]]:
    """Compute rows with these adapters in one batch: prompts, then single tokens beside a chunk, then single tokens.

    Returns: row, length and logits of each of the last two passes.
    """

    def segment(row: int, begin: int, end: int) -> Segment:
        return Segment(row, begin, IDS[row][begin:end], adapters[row])

    def passed(segments: Sequence[Segment]) -> list[tuple[int, int, torch.Tensor]]:
        logits = runner.forward(segments, [True for _ in segments])
        return [(each.slot, each.end, logits[at]) for at, each in enumerate(segments)]

    runner.forward([segment(row, 0, 10 + row) for row in rows], [False for _ in rows])
    ends = {row: 17 + row if row == 2 else 11 + row for row in rows}
    chunk_last = sorted(rows, key=lambda row: row == 2)
    found = passed([segment(row, 10 + row, ends[row]) for row in chunk_last])
    return found + passed([segment(row, ends[row], ends[row] + 1) for row in rows])


@pytest.mark.parametrize("compiled", ["none", "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen3", *TARGETS])
def test_a_batchs_rows_have_the_scores_of_pefts_merged_models(family: str, compiled: Compile, tmp_path: Path) -> None:
    """Ranks 4, 16 and 64, rank-stabilized or not, all linear layers or some, files in three types; one row has none."""
    build, names = FAMILIES[family], TARGETS.get(family, [*ATTENTION, *MLP])
    some, others = {"target_modules": names[:1]}, {"target_modules": names[-2:]}
    built = [
        adapted(build, tmp_path / "a", seed=1, r=4, lora_alpha=8, target_modules=names),
        adapted(build, tmp_path / "b", seed=2, r=16, lora_alpha=4, use_rslora=True, dtype=torch.float16, **some),
        adapted(build, tmp_path / "c", seed=3, r=64, dtype=torch.bfloat16, **others),
        (None, make(build)),
    ]
    who = [0, 3, 1, 2, 0, 3]
    runner = model_runner(make(build), compiled)

    found = mixed_passes(runner, [built[each][0] for each in who])

    assert len(found) == 12
    for row, length, logits in found:
        expected = scores(built[who[row]][1], IDS[row][:length])
        assert (logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "model_dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.soak)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_native_layers_give_a_token_the_same_bits_beside_any_others(
    kind: str, model_dtype: torch.dtype, tmp_path: Path
) -> None:
    """A row's logits alone are its logits in a batch, with an adapter in any type and without."""
    build, model = KINDS[kind], make(KINDS[kind]).to(model_dtype)
    adapters = list[LoraAdapter]()
    for rank, dtype in ((3, torch.bfloat16), (8, torch.float16), (5, torch.float32)):
        folder = tmp_path / str(rank)
        save_adapter(make(build), folder, seed=rank, r=rank, dtype=dtype, target_modules=[*ATTENTION, *MLP])
        adapters.append(read(folder, model))
    runner = model_runner(model, "layers")
    assert isinstance(runner.executor, NativeDecoderExecutor)
    who = [adapters[0], None, adapters[1], adapters[0], adapters[0], adapters[2]]
    batched = {(row, length): logits for row, length, logits in mixed_passes(runner, who)}
    single = {(row, length): logits for own in range(6) for row, length, logits in mixed_passes(runner, who, [own])}

    assert batched.keys() == single.keys()
    assert all(torch.equal(logits, single[place]) for place, logits in batched.items())


def test_native_layers_in_bfloat16_are_as_near_to_exact_scores_as_torch(tmp_path: Path) -> None:
    build = KINDS["norms of heads"]
    exact, reference = adapted(build, tmp_path, r=8, target_modules=[*ATTENTION, *MLP])
    halved = read(tmp_path, make(build).bfloat16())
    errors = {}
    for setting in ("none", "layers"):
        logits = mixed_passes(model_runner(make(build).bfloat16(), setting), [halved, None] * 3)
        found = [(row, length, each) for row, length, each in logits if row % 2 == 0]
        wanted = [scores(reference, IDS[row][:length]) for row, length, _ in found]
        errors[setting] = max(
            float((each.float() - right).norm() / right.norm()) for (*_, each), right in zip(found, wanted, strict=True)
        )

    assert exact.digest == halved.digest
    assert errors["layers"] <= max(errors["none"], 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_an_adapter_of_16_bits_takes_them_and_computes_what_it_does_in_float32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Bit for bit in native layers; also where a file stores such numbers as float32, as PEFT does after a training."""
    build = KINDS["norms of heads"]
    save_adapter(make(build), tmp_path, r=3, lora_alpha=4, dtype=dtype, target_modules=[*ATTENTION, *MLP])
    narrow = read(tmp_path, make(build))
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(weights).items()}, weights)
    stored_wide = read(tmp_path, make(build))
    wide = LoraAdapter(
        "wide", {path: LoraWeights(d.float(), u.float(), s) for path, (d, u, s) in narrow.layers.items()}
    )
    runner = model_runner(make(build), "layers")

    found, same, expected = (mixed_passes(runner, [each] * 6) for each in (narrow, stored_wide, wide))

    assert {dtype} == {
        half.dtype for each in (narrow, stored_wide) for d, u, _ in each.layers.values() for half in (d, u)
    }
    for (*_, left), (*_, middle), (*_, right) in zip(found, same, expected, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(middle, right)


def test_int8_layers_have_adapters_in_floats_beside_them(tmp_path: Path) -> None:
    build = FAMILIES["llama"]
    adapter, reference = adapted(build, tmp_path, r=8)
    model = make(build)
    quantize_linears(model, torch.tensor([IDS[0][:16]]), int8_linear)

    logits = model_runner(model).forward([Segment(0, 0, IDS[0][:20], adapter)], [True])[0]

    expected, plain = scores(reference, IDS[0][:20]), scores(make(build), IDS[0][:20])
    assert (logits - expected).norm() < 0.1 * (plain - expected).norm()


def test_layers_compiled_by_torch_step_aside_for_batches_with_adapters(tmp_path: Path) -> None:
    build = FAMILIES["llama"]
    adapter, reference = adapted(build, tmp_path, r=8)
    runner = create_torch_runner(make(build), length=CONTEXT, slots=6, free_bytes=10**9)
    install_verified(runner, TorchCompileExecutor(runner.executor, runner.model, runner.cache, backend="eager"), 1e-3)

    plain = runner.forward([Segment(0, 0, IDS[0][:9])], [True])[0]
    found = runner.forward([Segment(0, 0, IDS[0][:9], adapter)], [True])[0]
    again = runner.forward([Segment(0, 0, IDS[0][:9])], [True])[0]

    expected = scores(reference, IDS[0][:9])
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(plain, again)


def test_what_overflows_in_one_adapter_stays_its_own(tmp_path: Path) -> None:
    """Infinite products of one row's adapter do not become NaN in the rows of others."""
    build = FAMILIES["llama"]
    adapter, reference = adapted(build, tmp_path / "a", seed=1, r=4)
    save_adapter(make(build), tmp_path / "huge", seed=2, r=4)
    huge = read(tmp_path / "huge", make(build))
    for weights in huge.layers.values():
        weights.down.mul_(1e38)

    found = mixed_passes(model_runner(make(build)), [adapter, huge, None, huge, adapter, None])

    for row, length, logits in found:
        if row in (0, 4):
            expected = scores(reference, IDS[row][:length])
            assert (logits - expected).norm() <= 1e-5 * expected.norm()


def submit(runner: Any, number: int, prompt: Sequence[int], adapter: LoraAdapter | None, **settings: Any) -> None:
    digest = None if adapter is None else adapter.digest
    params = SamplingParams(**{"max_tokens": NEW, **settings})
    runner.submit(Submit(number, tuple(prompt), params, "tenant", adapter=digest))


@pytest.mark.parametrize("compiled", [None, "auto"], ids=["torch", "auto"])
def test_completions_are_those_of_the_merged_models(compiled: Compile | None, tmp_path: Path) -> None:
    """One tenant sends the same prompts with two adapters and with none, which start one after the other."""
    build = FAMILIES["llama"]
    built = [adapted(build, tmp_path / str(seed), seed=seed, r=8) for seed in (1, 2)]
    models = [*built, (None, make(build))]
    runner, events = runner_for(make(build), slots=4, compiled=compiled), list[TokenEvent]()
    for adapter, _ in built:
        runner.add_adapter(adapter)

    for number in range(9):
        submit(runner, number, PROMPTS[1 + number // 3], models[number % 3][0])
        runner.step(events.extend)
    events += run(runner)

    expected = [generate(models[number % 3][1], PROMPTS[1 + number // 3]) for number in range(9)]
    assert expected == [completion_of(events, number) for number in range(9)]
    assert len({tuple(each) for each in expected}) > 6  # the adapters do change what is said


def test_a_prefix_is_reused_with_the_same_adapter_only(tmp_path: Path) -> None:
    """Also where another adapter, or the same name's new weights, computed the same tokens for the same tenant."""
    build = FAMILIES["llama"]
    adapters = [adapted(build, tmp_path / str(seed), seed=seed, r=8)[0] for seed in (1, 2)]
    runner = runner_for(make(build), slots=4)
    for adapter in adapters:
        runner.add_adapter(adapter)

    def cached(adapter: LoraAdapter | None) -> int:
        submit(runner, 1, PROMPTS[3], adapter, max_tokens=1)
        return next(event.cached_tokens for event in run(runner) if event.id == 1)

    assert [0, 0, 0] == [cached(adapter) for adapter in (*adapters, None)]
    assert [29, 29, 29] == [cached(adapter) for adapter in (*adapters, None)]


@pytest.mark.parametrize("compiled", [None, "layers"], ids=["torch", "layers"])
def test_a_removed_adapter_ends_its_requests_and_frees_its_memory(compiled: Compile | None, tmp_path: Path) -> None:
    """Other requests go on; a new one that names it is refused."""
    build = FAMILIES["llama"]
    adapter, other = (adapted(build, tmp_path / str(seed), seed=seed, r=8)[0] for seed in (1, 2))
    runner, events = runner_for(make(build), slots=4, compiled=compiled), list[TokenEvent]()
    for each in (adapter, other):
        runner.add_adapter(each)
        submit(runner, int(each is other), PROMPTS[1], each)
    for _ in range(3):
        runner.step(events.extend)
    gone = weakref.ref(adapter)

    runner.remove_adapter(adapter.digest)
    submit(runner, 2, PROMPTS[1], adapter)
    del adapter, each
    events += run(runner)
    gc.collect()

    assert "abort" == ending_of(events, 0)
    assert "length" == ending_of(events, 1)
    assert "no longer loaded" in str(ending_of(events, 2))
    assert gone() is None
