"""The step-time model: how many prefill tokens a step may hold beside decoding sequences."""

from app.worker.scheduling.step_time import StepTimeModel


def measured() -> StepTimeModel:
    """A step of one token takes 29 ms, and each further token one more."""
    model = StepTimeModel()
    for _ in range(50):
        model.observe(2, 0.030)
        model.observe(102, 0.130)
    return model


def test_the_prefill_budget_is_what_streams_can_bear():
    """All that fits while nothing decodes; beside a stream so much that a step takes four fifths longer."""
    model, new = measured(), StepTimeModel()
    assert StepTimeModel.MAX_PREFILL_TOKENS == new.prefill_token_budget(decodes=0)
    assert StepTimeModel.INITIAL_PREFILL_TOKENS == new.prefill_token_budget(decodes=1)
    assert (512, 23, 39) == tuple(model.prefill_token_budget(decodes) for decodes in (0, 1, 21))
    for _ in range(50):
        model.observe(101, 9.0)
        model.observe(1, 0.01)
    assert StepTimeModel.MIN_PREFILL_TOKENS == model.prefill_token_budget(decodes=1)


def test_the_budget_grows_with_the_prompts_that_wait():
    """In proportion to their number, up to a bound."""
    model = measured()
    assert [23, 23, 46, 92, 92] == [model.prefill_token_budget(1, waiting) for waiting in (0, 1, 2, 4, 30)]
