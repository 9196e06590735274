"""Hidden states to vectors: each pooling is what its name says, whatever stands in the padding."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from app.worker.embedding.pooling import POOLING, Head, Projection, normalize

BY_HAND: Mapping[str, Callable[[list[Tensor]], Tensor]] = {
    "cls": lambda tokens: tokens[0],
    "max": lambda tokens: torch.stack(tokens).amax(dim=0),
    "mean": lambda tokens: sum(tokens, torch.zeros(4)) / len(tokens),
    "mean_sqrt_len_tokens": lambda tokens: sum(tokens, torch.zeros(4)) / math.sqrt(len(tokens)),
    "lasttoken": lambda tokens: tokens[-1],
}


@pytest.fixture
def states() -> Tensor:
    """The hidden states of three texts of five tokens."""
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]).bool()
"""A whole text, a short one, and one whose prompt is not pooled."""


@pytest.mark.parametrize("name", BY_HAND)
def test_a_vector_is_that_of_the_tokens_that_count(name: str, states: Tensor):
    states[~MASK] = 1e6
    vectors = Head((name,))(states, MASK, [None] * 3)

    for row in range(3):
        expected = BY_HAND[name](list(states[row][MASK[row]]))
        torch.testing.assert_close(vectors[row], expected)


def test_the_weighted_mean_weighs_a_token_by_its_position(states: Tensor):
    """The positions are those in the whole text, its prompt included."""
    (vector,) = Head(("weightedmean",))(states[2:], MASK[2:], [None])
    torch.testing.assert_close(vector, (2 * states[2, 1] + 3 * states[2, 2] + 4 * states[2, 3]) / 9)


def test_several_poolings_are_put_one_after_the_other(states: Tensor):
    both = Head(("max", "mean"))(states, MASK, [None] * 3)
    single = [Head((name,))(states, MASK, [None] * 3) for name in ("max", "mean")]
    for row in range(3):
        torch.testing.assert_close(both[row], torch.cat([single[0][row], single[1][row]]))


def test_steps_follow_the_pooling_in_their_order(states: Tensor):
    projection = Projection(nn.Linear(4, 2), nn.Tanh())
    with torch.no_grad():
        vectors = Head(("mean",), (projection, normalize))(states, MASK, [None] * 3)
        pooled = Head(("mean",))(states, MASK, [None] * 3)
        expected = torch.tanh(projection.linear(pooled[0]))
    torch.testing.assert_close(vectors[0], expected / expected.norm())


def test_a_residual_adds_the_input(states: Tensor):
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        (with_input,) = Head(("cls",), (Projection(linear, nn.Identity(), residual=True),))(
            states[:1], MASK[:1], [None]
        )
        torch.testing.assert_close(with_input, linear(states[0, 0]) + states[0, 0])


@pytest.mark.parametrize("normalized", [True, False])
def test_a_shortened_vector_is_the_beginning_and_as_long_as_the_whole_if_that_is_normalized(
    normalized: bool, states: Tensor
):
    steps = (normalize,) if normalized else ()
    whole, cut = Head(("mean",), steps)(states[:1].repeat(2, 1, 1), MASK[:1].repeat(2, 1), [None, 2])
    expected = whole[:2] / whole[:2].norm() if normalized else whole[:2]
    torch.testing.assert_close(cut, expected)


@pytest.mark.parametrize("name", POOLING)
def test_states_of_16_bits_are_pooled_in_32(name: str):
    states = torch.full((1, 2000, 1), 1.0, dtype=torch.bfloat16)
    (vector,) = Head((name,))(states, torch.ones(1, 2000, dtype=torch.bool), [None])
    assert torch.float32 == vector.dtype
    assert vector.item() == pytest.approx(math.sqrt(2000) if name == "mean_sqrt_len_tokens" else 1.0)
