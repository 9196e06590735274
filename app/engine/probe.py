"""Probes a model that has been loaded, before any request gets it: a prompt has to be completed with finite scores."""

import asyncio
import math
from contextlib import aclosing
from uuid import uuid4

from msgspec import structs

from app.engine.served_model import Served, ServedEncoder, ServedModel
from app.errors import AppError, ModelLoadFailed, ShuttingDown
from app.events import Delta, Finished
from app.requests import GenerationRequest
from app.types import FinishReason, SamplingParams, Tenant


class PromptProbe:
    """Has a model complete one prompt; a `Probe`."""

    def __init__(self, prompt: str, *, max_tokens: int, seconds: float) -> None:
        """Args: seconds: how long it may take."""
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._seconds = seconds

    async def __call__(self, model: Served) -> None:
        """Raises: ModelLoadFailed: the model does not complete the prompt, or its scores are no numbers."""
        if isinstance(model, ServedEncoder):
            return
        try:
            async with asyncio.timeout(self._seconds):
                ended = await self._complete(model)
        except TimeoutError:
            raise _failed(f"it took more than {self._seconds:g} s") from None
        except (ModelLoadFailed, ShuttingDown):
            raise
        except AppError as error:
            raise _failed(error.message.rstrip(".")) from error
        if not ended:
            raise _failed("it was not completed")

    async def _complete(self, model: ServedModel) -> bool:
        """Return whether the prompt was completed to its end."""
        unsupported = model.engine.info.capabilities.unsupported
        request = GenerationRequest(
            id=f"probe-{uuid4().hex}",
            tenant=Tenant.program(),
            text=self._prompt,
            sampling=SamplingParams(max_tokens=self._max_tokens, logprobs=None if "logprobs" in unsupported else 0),
            cache=False,
        )
        prepared = await model.engine.prepare(request)
        async with aclosing(model.engine.stream(structs.replace(request, prompt_ids=prepared.prompt_ids))) as events:
            async for event in events:
                if isinstance(event, Delta) and not all(math.isfinite(each.logprob) for each in event.logprobs):
                    raise _failed("its log-probabilities are not finite")
                if isinstance(event, Finished):
                    return event.samples[0].finish_reason is not FinishReason.ABORT
        return False


def _failed(reason: str) -> ModelLoadFailed:
    return ModelLoadFailed(f"The model fails mlflow.probe_prompt: {reason}.", details={"reason": "failed"})
