"""The step-time model: how many prefill tokens a step may hold beside decoding sequences."""

import pytest

from app.worker.scheduling.step_time import GpuStepTime, StepTimeModel


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


def accelerator(*, decode: float, fixed: float, per_token: float) -> GpuStepTime:
    """Steps that decode take `decode` seconds; a chunk of a prompt adds `fixed` and `per_token` for each token."""
    model = GpuStepTime()
    for chunk in (512, 2048, 100, 700):
        model.observe(8, decode)
        model.observe(8 + chunk, decode + fixed + per_token * chunk, prefill=chunk)
    return model


def test_a_chunk_on_a_gpu_is_as_long_as_it_costs_by_itself():
    """Launching its kernels takes 12 ms, however few tokens it has: few at a time would cost that each time."""
    model = accelerator(decode=0.002, fixed=0.012, per_token=0.00001)
    assert [1200, 1200] == pytest.approx([model.prefill_token_budget(decodes) for decodes in (1, 128)], abs=1)


def test_a_slow_gpu_does_not_keep_streams_waiting():
    """Where tokens are what takes time, a step is four fifths longer, or more where several prompts wait."""
    model = accelerator(decode=0.100, fixed=0.001, per_token=0.0005)
    assert [158, 638] == pytest.approx([model.prefill_token_budget(8, waiting) for waiting in (1, 4)], abs=1)


def test_a_prompt_alone_is_computed_in_few_steps_on_a_gpu():
    """And beside others too, where its length makes no difference; a first chunk says how long they take."""
    new, launches = GpuStepTime(), accelerator(decode=0.010, fixed=0.005, per_token=0.0)
    assert [512, 512] == [new.prefill_token_budget(decodes) for decodes in (0, 8)]
    assert [2048, 2048] == [launches.prefill_token_budget(decodes) for decodes in (0, 8)]


def test_no_chunk_takes_longer_than_a_second_however_slow_a_gpu_is():
    """Nothing else of the process goes on meanwhile."""
    model = GpuStepTime()
    model.observe(512, 1.0, prefill=512)
    assert [512, 512] == [model.prefill_token_budget(decodes) for decodes in (0, 8)]
    model.observe(512, 9.0, prefill=512)
    assert 64 <= model.prefill_token_budget(0) <= 128
