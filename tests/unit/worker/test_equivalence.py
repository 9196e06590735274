"""The proof at load: rounding never keeps a healthy model from being batched, and never hides a wrong packed batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import AttentionInterface

from app.worker.execution.base import ExecutorUnavailableError, UnsupportedModelError
from app.worker.execution.dot_product import scaled_dot_product
from app.worker.execution.float32_mode import Float32Mode
from app.worker.execution.model_runner import MAX_EXPLAINED, relative_error
from app.worker.execution.quantization import quantize_linears
from app.worker.execution.torch import attention, equivalence
from app.worker.execution.torch.equivalence import TOLERANCE, torch_runner, verify_packed_batches
from app.worker.execution.torch.int8_linear import int8_linear
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.execution.transformers_forward import ATTENTION
from tests.unit.worker.families import CONTEXT, FAMILIES, VOCABULARY, make

IDS = [(5 * place + 3) % VOCABULARY for place in range(24)]
FREE = 10**9
LOUD = {torch.bfloat16: 0.2, torch.float16: 0.3}
"""Standard deviations of weights with which rounding moves a deep model's logits by more than the tolerance."""


def deep(dtype: torch.dtype, deviation: float, **settings: Any) -> Any:
    """Return a narrow Llama of 64 layers, whose attention is sharp."""
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": deviation,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(3)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**config | settings)).eval().to(dtype)


@pytest.fixture(scope="module", params=LOUD, ids=str)
def loud(request: pytest.FixtureRequest) -> Any:
    return deep(request.param, LOUD[request.param])


def test_a_deep_model_is_batched_although_rounding_moves_its_logits_by_more_than_the_tolerance(loud: Any) -> None:
    """Its weights are afterwards what they were."""
    proof = verify_packed_batches(loud, CONTEXT, FREE)

    assert proof.noise > TOLERANCE[loud.dtype]
    assert {loud.dtype} == {weight.dtype for weight in loud.parameters()}
    assert proof.bytes_per_token == 64 * 2 * 2 * 16 * 2


def rotate(change: Callable[[Tensor], Tensor]) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Return a mistake in positions, as the rotary embedding sees them."""

    def install(model: Any, patch: pytest.MonkeyPatch) -> None:
        own = model.model.rotary_emb.forward
        patch.setitem(
            vars(model.model.rotary_emb), "forward", lambda x, position_ids: own(x, position_ids=change(position_ids))
        )

    return install


def attend(change: Callable[[Tensor, dict[str, Any]], Tensor]) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Return a mistake in what packed attention is handed: the queries, or named settings."""

    def install(model: Any, patch: pytest.MonkeyPatch) -> None:
        own = AttentionInterface()[ATTENTION]

        def wrong(module: Any, query: Tensor, *others: Any, **named: Any) -> Any:
            return own(module, change(query, named), *others, **named)

        patch.setitem(AttentionInterface._global_mapping, ATTENTION, wrong)

    return install


def without_masks(model: Any, patch: pytest.MonkeyPatch) -> None:
    own = scaled_dot_product
    patch.setattr(
        attention,
        "scaled_dot_product",
        lambda q, k, v, mask, scale, softcap, *, causal: own(q, k, v, None, scale, softcap, causal=False),
    )


def mixing_tokens(model: Any, patch: pytest.MonkeyPatch) -> None:
    own = model.model.norm.forward
    patch.setitem(vars(model.model.norm), "forward", lambda x: own(x) + own(x).mean(dim=1, keepdim=True))


def rescaled(query: Tensor, named: dict[str, Any]) -> Tensor:
    named["scaling"] *= 1.05
    return query


MISTAKES: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    "positions that begin anew in each pass": rotate(lambda positions: torch.arange(positions.shape[1])[None]),
    "a position too far in steps of single tokens": rotate(
        lambda positions: positions + 1 if positions.shape[1] == 2 else positions
    ),
    "heads in another order": attend(lambda query, named: query.flip(1)),
    "scores that are 5 % too large": attend(rescaled),
    "tokens that see what comes after them": without_masks,
    "tokens that see their neighbours": mixing_tokens,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_mistake_hides_behind_rounding(mistake: str, loud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model whose own rounding is larger than some of these mistakes."""
    MISTAKES[mistake](loud, monkeypatch)

    with pytest.raises(UnsupportedModelError, match="logits differ"):
        verify_packed_batches(loud, CONTEXT, FREE)


def narrower(query: Tensor, named: dict[str, Any]) -> Tensor:
    named["sliding_window"] -= 1
    return query


def test_a_window_of_one_key_less_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(torch.bfloat16, 0.2)
    config = {**model.config.to_dict(), "sliding_window": 8}
    torch.manual_seed(3)
    windowed = hf.MistralForCausalLM(hf.MistralConfig(**config)).eval().bfloat16()
    windowed.load_state_dict(model.state_dict())
    assert verify_packed_batches(windowed, CONTEXT, FREE).noise > 0

    attend(narrower)(windowed, monkeypatch)
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        verify_packed_batches(windowed, CONTEXT, FREE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_deep_model_in_integers_is_batched_and_a_wrong_one_is_not(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep(dtype, 0.1)
    quantize_linears(model, torch.tensor([IDS]), int8_linear)
    assert verify_packed_batches(model, CONTEXT, FREE).noise > 0

    MISTAKES["a position too far in steps of single tokens"](model, monkeypatch)
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        verify_packed_batches(model, CONTEXT, FREE)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", LOUD, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_arithmetic_gives_the_logits_of_a_model_in_float32(family: str, dtype: torch.dtype) -> None:
    """Of the same weights; the model itself goes on to compute in its own type."""
    model, exact = make(FAMILIES[family]).to(dtype), make(FAMILIES[family]).to(dtype).float()
    for each in (model, exact):
        each.set_attn_implementation("eager")
    ids = torch.tensor([IDS])
    with Float32Mode():
        found = model(input_ids=ids, use_cache=False).logits
    expected = exact(input_ids=ids, use_cache=False).logits

    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= (1e-6 if "gemma" not in family else 1e-3)
    assert model(input_ids=ids, use_cache=False).logits.dtype == dtype


@pytest.mark.parametrize("reason", ["memory", "operators"])
def test_where_nothing_can_be_computed_in_float32_the_own_type_is_the_reference(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with little rounding is batched, and a wrong one is not."""
    model, free_bytes = deep(torch.bfloat16, 0.1), 1 if reason == "memory" else FREE

    def refuse(self: Any, *arguments: Any) -> Any:
        raise NotImplementedError("this kernel takes 16 bits only")

    if reason == "operators":
        monkeypatch.setattr(Float32Mode, "__torch_function__", refuse)
    assert verify_packed_batches(model, CONTEXT, free_bytes).noise < TOLERANCE[torch.bfloat16]

    MISTAKES["heads in another order"](model, monkeypatch)
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        verify_packed_batches(model, CONTEXT, free_bytes)


def test_float32_models_are_compared_in_one_pass_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("there is nothing to learn from it")

    monkeypatch.setattr(equivalence, "_exact_logits", refuse)

    assert 0 == create_torch_runner(make(FAMILIES["llama"]), length=CONTEXT, slots=2, free_bytes=FREE).noise


@pytest.mark.parametrize(("noise", "share", "is_equal"), [(0, 0.1, False), (0.1, 0.1, True), (9, 0.6, False)])
def test_another_way_of_execution_may_be_as_far_off_as_rounding_and_no_farther(
    noise: float, share: float, is_equal: bool
) -> None:
    """And never so far that a wrong one could not be told from it."""
    runner = torch_runner(make(FAMILIES["llama"]), slots=2, length=CONTEXT, noise=noise)
    reference = runner.reference_logits() * (1 + share)
    assert 0.3 == MAX_EXPLAINED

    if is_equal:
        runner.verify_equivalence(reference, 0.05)
    else:
        with pytest.raises(ExecutorUnavailableError, match="its logits differ"):
            runner.verify_equivalence(reference, 0.05)
