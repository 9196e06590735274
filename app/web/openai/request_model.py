"""The request fields that chat and plain completions have in common, OpenAI's and vLLM's extras.

Decides ranges, and what holds where a request names nothing: the configuration, else what the model's files recommend,
else OpenAI's own defaults.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints

from app.engine.base import EngineInfo
from app.errors import InvalidRequest
from app.generation.requests import Sampling
from app.web.http.dependencies import Parts
from app.web.http.json_body import StrictModel
from app.web.http.sampling_params import MAX_TOKENS, Answers, LogitBias, Penalty, StopText, TokenCount, TokenId, listed
from app.web.openai.stream_encoder import UsageTold
from app.web.openai.validators import Only

Stop = Annotated[list[StopText], Field(max_length=16), BeforeValidator(listed, json_schema_input_type=str | list[str])]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]

_GREEDY = 0.01
"""Cooler than this every answer is the same."""


class StreamOptions(StrictModel):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="vLLM's: each chunk tells the tokens so far.")
    include_obfuscation: Annotated[Any, Only(False)] = None


class OpenAIFields(StrictModel):
    """How the answer is drawn and delivered."""

    model: Name | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Answers | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = Field(
        None, description="The caller's end user; a hash of it stands in the log."
    )
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = Field(None, description="0 and -1 keep all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None

    @property
    def usage_told(self) -> UsageTold:
        """When a stream tells its usage."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return UsageTold.NEVER
        return UsageTold.ALWAYS if options.continuous_usage_stats else UsageTold.AT_THE_END

    def check_stream_options(self) -> None:
        """Raises: InvalidRequest: they are given, and the answer is no stream, or one needs another."""
        options = self.stream_options
        if options is not None and not self.stream:
            raise InvalidRequest.of_field("stream_options", "is only possible where stream is true")
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise InvalidRequest.of_field("stream_options.continuous_usage_stats", "needs include_usage")

    def sampling(self, served: "Served", *, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """Translate, with the defaults filled in."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=self._or_default("temperature", served, 1.0),
            top_p=self._or_default("top_p", served, 1.0),
            top_k=max(0, int(self._or_default("top_k", served, 0))),
            min_p=self._or_default("min_p", served, 0.0),
            repetition_penalty=self._or_default("repetition_penalty", served, 1.0),
            stop=tuple(self.stop or ()),
            seed=None if self.seed is None else self.seed % 2**63,
            n=self.n or 1,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or (),
            logprobs=logprobs,
            stop_token_ids=tuple(sorted(set(self.stop_token_ids or ()))),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
        )

    def _or_default(self, name: str, served: "Served", usual: float) -> float:
        given: float | None = getattr(self, name)
        return served.defaults.get(name, usual) if given is None else given


@dataclass(frozen=True, slots=True)
class Served:
    """What is known of the model that a request names."""

    info: EngineInfo
    defaults: dict[str, float]
    """Sampling settings that differ from OpenAI's own defaults."""
    caches: bool
    """Whether there is a response cache."""

    @classmethod
    def of(cls, parts: Parts, model: str | None) -> "Served":
        """Raises: ModelNotFound; EngineNotReady: nothing is known of it yet."""
        info = parts.engines.find(model).info
        defaults = {name: value for name, value in info.recommended if name not in info.unsupported}
        if parts.settings.openai.temperature is not None:
            defaults["temperature"] = parts.settings.openai.temperature
        return cls(info=info, defaults=defaults, caches=parts.settings.cache.enabled)


def is_deterministic(sampling: Sampling) -> bool:
    """Whether the same request has the same answer every time: only such answers may come from the cache."""
    return sampling.seed is not None or (sampling.temperature is not None and sampling.temperature < _GREEDY)
