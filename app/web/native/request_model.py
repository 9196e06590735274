"""The request fields that the native generating routes share: sampling parameters and their synonyms."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints

from app.errors import InvalidRequest
from app.requests import GenerationRequest
from app.web.http.dependencies import RequestContext
from app.web.http.sampling_params import (
    MAX_TOKENS,
    AdapterField,
    LogitBias,
    Penalty,
    SampleCount,
    StopTexts,
    TokenCount,
    TokenId,
    TopP,
    Truncation,
    split_params,
)
from app.web.http.structured_output import StructuredFields


def _alternative_count(value: Any) -> Any:
    """Return how many alternatives are requested, or None for no log-probabilities."""
    return (0 if value else None) if isinstance(value, bool) else value


_AlternativeCount = Annotated[int, Field(ge=0, le=20)]
_Logprobs = Annotated[
    _AlternativeCount | None,
    BeforeValidator(_alternative_count, json_schema_input_type=bool | _AlternativeCount | None),
]


class SamplingFields(StructuredFields):
    """Sampling parameters and delivery options of a generating request; a field that is left out stays None."""

    max_tokens: TokenCount | None = None
    max_new_tokens: TokenCount | None = Field(None, description="Another name of max_tokens.")
    max_length: TokenCount | None = Field(None, description="Another name of max_tokens.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy.")
    top_p: TopP | None = Field(None, description="0 is greedy.")
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(None, description="0 keeps all tokens.")
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = Field(None, description="1 is off.")
    stop: StopTexts = Field(None, description="Stop strings: the completion ends before the first of them.")
    stop_sequences: StopTexts = Field(None, description="Another name of stop.")
    stop_tokens: StopTexts = Field(None, description="Another name of stop.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description="Makes the completion reproducible.")
    stream: bool | None = None
    cache: bool | None = Field(None, description="false bypasses the response cache.")
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    adapter: AdapterField = None
    n: SampleCount | None = Field(None, description="Number of completions.")
    num_return_sequences: SampleCount | None = Field(None, description="Another name of n.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Minimum probability relative to the most likely token."
    )
    presence_penalty: Penalty | None = Field(
        None, description="Subtracted from the logit of each token that the completion has."
    )
    frequency_penalty: Penalty | None = Field(None, description="The same, once per occurrence.")
    logit_bias: LogitBias = Field(None, description="Token id -> value added to its logit, -100 to 100.")
    logprobs: _Logprobs = Field(
        None, description="Report each token's log-probability, and those of this many likely alternatives."
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = Field(
        None, description="The completion ends at any of these tokens, too."
    )
    ignore_eos: bool | None = Field(None, description="Continue after the model's own end tokens.")
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="No end token before the completion has this many tokens."
    )

    truncation: Truncation = None

    @property
    def answers(self) -> int:
        return max(self.n or 1, self.num_return_sequences or 1)

    def to_request(self, context: RequestContext, **prompt: Any) -> GenerationRequest:
        """Return the request with this prompt, each synonym under its canonical name.

        Raises: InvalidRequest: two names of one field have different values.
        """
        sampling, unset = split_params(
            {
                "max_tokens": self._one_of("max_tokens", "max_new_tokens", "max_length"),
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
                "repetition_penalty": self.repetition_penalty,
                "stop": _as_tuple(self._one_of("stop", "stop_sequences", "stop_tokens")),
                "seed": self.seed,
                "min_p": self.min_p,
                "presence_penalty": self.presence_penalty,
                "frequency_penalty": self.frequency_penalty,
                "logit_bias": self.logit_bias,
                "logprobs": self.logprobs,
                "stop_token_ids": _as_tuple(self.stop_token_ids and sorted(set(self.stop_token_ids))),
                "ignore_eos": self.ignore_eos,
                "min_tokens": self.min_tokens,
                "grammar": self.grammar(context),
            }
        )
        return context.generation(
            sampling=sampling,
            unset=unset,
            n=self._one_of("n", "num_return_sequences") or 1,
            model=self.model,
            adapter=self.adapter,
            cache=self.cache is not False and context.may_cache,
            stream=bool(self.stream),
            truncate_prompt=0 if self.truncation == "auto" else None,
            **prompt,
        )

    def _one_of(self, *names: str) -> Any:
        given = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        for name, value in given[1:]:
            if value != given[0][1]:
                raise InvalidRequest.of_field(
                    name, f"and {given[0][0]} are two names of one field and have different values"
                )
        return given[0][1] if given else None


def _as_tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
