"""The largest step that a runner may be asked for, computed once at load: whether there is memory for it."""

import logging
from collections.abc import Iterator

import torch

from app.types import SamplingParams
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.packed_batch import Segment
from app.worker.sampling.device_sampler import DeviceSampler
from app.worker.sampling.sampler import SequenceSampler
from app.worker.sampling.sampling_graphs import Record
from app.worker.sampling.sampling_step import SampledRow

log = logging.getLogger(__name__)

PARAMS = SamplingParams(
    max_tokens=1,
    temperature=1.0,
    top_p=0.9,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    logprobs=1,
    logit_bias=((0, 1.0),),
)
"""Settings that take all the memory that sampling can."""


def compute_largest_step(runner: ModelRunner, prompt_tokens: int) -> DeviceSampler:
    """Decode in all slots but one, compute a chunk of a prompt in that, and sample; overwrites the KV cache.

    Returns: the sampler, which has recorded its steps if it can.
    Raises: torch.OutOfMemoryError, or another error of `is_out_of_memory`: there is no memory for it.
    """
    sampler = DeviceSampler(runner.cache.slots, runner.vocab_size, runner.cache.device)
    if runner.record is not None:
        _record(sampler, runner.record)
    segments = list(_segments(runner, prompt_tokens))
    logits = runner.forward(segments, [True] * len(segments))
    rows = [
        SampledRow(each.slot, SequenceSampler(PARAMS, each.token_ids, (), runner.vocab_size, logits.device), 0)
        for each in segments
    ]
    sampler.sample(logits, rows).read()
    # A NaN would spoil even attention that masks it.
    for slot in range(runner.cache.slots):
        runner.cache.clear_slot(slot)
    return sampler


def _record(sampler: DeviceSampler, record: Record) -> None:
    try:
        sampler.record(record)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # noqa: BLE001  # whatever cannot be captured is launched
        log.warning("the kernels of sampling are launched one by one: %s: %s", type(error).__name__, error)


def _segments(runner: ModelRunner, prompt_tokens: int) -> Iterator[Segment]:
    last = runner.cache.length - 1
    for slot in range(runner.cache.slots - 1):
        yield Segment(slot, last, [0])
    yield Segment(runner.cache.slots - 1, 0, [0] * min(prompt_tokens, runner.cache.length))
