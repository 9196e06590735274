"""The request fields that chat and plain completions share: OpenAI's and vLLM's extensions, with their ranges.

A field that is left out takes the configured default, else the one that the model's files recommend, else OpenAI's.
"""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, StringConstraints, WithJsonSchema

from app.errors import InvalidRequest
from app.requests import GenerationRequest
from app.web.http.dependencies import RequestContext
from app.web.http.json_body import StrictModel
from app.web.http.sampling_params import (
    MAX_TOKENS,
    AdapterField,
    LogitBias,
    Penalty,
    SampleCount,
    StopTexts,
    TokenId,
    TopP,
    Truncation,
    split_params,
    supported_params,
)
from app.web.http.structured_output import GuidedFields
from app.web.http.validation import name_ignored
from app.web.openai.neutral_fields import NeutralFields
from app.web.openai.stream_encoder import StreamUsage
from app.web.openai.validators import NeutralOnly

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]


_TRUNCATE_SCHEMA = {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS}]}


def _tokens_to_keep(value: int) -> int:
    if value != -1 and not 1 <= value <= MAX_TOKENS:
        raise ValueError("must be a number of tokens, or -1 for as many as fit")
    return value


class StreamOptions(StrictModel):
    """What a stream reports beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="vLLM's: each chunk reports the usage so far.")
    include_obfuscation: Annotated[Any, NeutralOnly(False)] = None


class OpenAIFields(NeutralFields, GuidedFields):
    """Sampling parameters and delivery options."""

    may_ignore_fields: ClassVar[bool] = True

    model: Name | None = None
    adapter: AdapterField = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="0 generates nothing, where something is asked of the prompt."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = Field(None, description="0 is greedy.")
    n: SampleCount | None = None
    stop: StopTexts = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = Field(None, description="0 and -1 keep all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    best_of: SampleCount | None = Field(None, description="Must equal n: all completions are returned.")
    priority: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None, description="vLLM's: a request of a higher number is served later than the others."
    )
    truncation: Truncation = None
    truncate_prompt_tokens: Annotated[int, AfterValidator(_tokens_to_keep), WithJsonSchema(_TRUNCATE_SCHEMA)] | None = (
        Field(None, description="vLLM's: keep so many of the prompt's last tokens; -1 keeps what fits.")
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="vLLM's: the log-probability of each token of the prompt, and of so many alternatives."
    )

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def stream_usage(self) -> StreamUsage:
        """When a stream reports token usage."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return StreamUsage.NEVER
        return StreamUsage.CONTINUOUS if options.continuous_usage_stats else StreamUsage.FINAL

    def check_stream_options(self) -> None:
        """Raises: InvalidRequest: the options are set without `stream`, or one without another that it needs."""
        options = self.stream_options
        if options is not None and not self.stream:
            raise InvalidRequest.of_field("stream_options", "is only possible where stream is true")
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise InvalidRequest.of_field("stream_options.continuous_usage_stats", "needs include_usage")

    @property
    def truncate_prompt(self) -> int | None:
        """How many tokens the prompt may have before its beginning goes; 0 is what fits, None refuses it instead.

        Raises: InvalidRequest: two fields contradict each other.
        """
        tokens = self.truncate_prompt_tokens
        if tokens is None:
            return 0 if self.truncation == "auto" else None
        if self.truncation == "disabled":
            raise InvalidRequest.of_field("truncate_prompt_tokens", "is not possible with truncation disabled")
        return max(0, tokens)

    def check_best_of(self) -> None:
        """Raises: InvalidRequest: completions would be generated only to be left out."""
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequest.of_field("best_of", "must be n: this service returns all answers that it makes")

    def check_prompt_options(self, *, max_tokens: int | None, echo: bool = False) -> None:
        """Raises: InvalidRequest: nothing is asked for, or the prompt's log-probabilities in a stream."""
        if max_tokens == 0 and not echo and self.prompt_logprobs is None:
            raise InvalidRequest.of_field("max_tokens", "must be at least 1 where nothing is asked of the prompt")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest.of_field("prompt_logprobs", "is not possible where stream is true, as in vLLM")

    def to_request(
        self,
        context: RequestContext,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        **prompt: Any,
    ) -> GenerationRequest:
        """Return the request with this prompt; what it leaves open follows the model's own recommendation.

        Raises: InvalidRequest: fields contradict each other.
        """
        self.check_best_of()
        sampling, unset = split_params(
            {
                "max_tokens": max_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": None if self.top_k is None else max(0, self.top_k),
                "min_p": self.min_p,
                "repetition_penalty": self.repetition_penalty,
                "stop": tuple(self.stop or ()),
                "seed": None if self.seed is None else self.seed % 2**63,
                "presence_penalty": self.presence_penalty,
                "frequency_penalty": self.frequency_penalty,
                "logit_bias": self.logit_bias,
                "logprobs": logprobs,
                "prompt_logprobs": prompt_logprobs,
                "stop_token_ids": tuple(sorted(set(self.stop_token_ids or ()))),
                "ignore_eos": self.ignore_eos,
                "min_tokens": self.min_tokens,
                "grammar": self.grammar(context),
            }
        )
        if context.ignores_unknown_fields:
            capabilities = context.model_info(self.model, self.adapter).capabilities
            sampling, unset, ignored = supported_params(sampling, unset, capabilities)
            name_ignored(context.request.scope, ignored)
        return context.generation(
            sampling=sampling,
            unset=unset,
            use_recommended=True,
            n=self.n or 1,
            model=self.model,
            adapter=self.adapter,
            cache=context.may_cache,
            cache_random=False,
            stream=bool(self.stream),
            counts_prompt=self.stream_usage is StreamUsage.CONTINUOUS,
            priority=self.priority or 0,
            truncate_prompt=self.truncate_prompt,
            **prompt,
        )
