"""The fields that every generating route takes: how to sample, and their other names.

Decides ranges and synonyms.  Knows no default of the service: what a client leaves out stays None.
"""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints

from app.errors import InvalidRequest, PromptTooLong
from app.generation.requests import Sampling
from app.web.http.json_body import StrictModel

MAX_TOKENS = 1_000_000
"""Above every context window; how much really fits is the service's to say."""

MAX_BIASES = 300
"""Far more than a request needs; each costs a little at every token."""

SessionId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,128}$")]

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
"""One spelling for each id, so that no token is named twice."""

TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def listed(value: Any) -> Any:
    """Put a single text in a list."""
    return [value] if isinstance(value, str) else value


_Stop = Annotated[
    list[StopText],
    Field(min_length=1, max_length=16),
    BeforeValidator(listed, json_schema_input_type=str | list[str]),
]


def _alternatives(value: Any) -> Any:
    """Return how many alternatives are asked for, None for no log-probabilities at all."""
    return (0 if value else None) if isinstance(value, bool) else value


_Logprobs = Annotated[
    Annotated[int, Field(ge=0, le=20)] | None, BeforeValidator(_alternatives, json_schema_input_type=bool | int | None)
]


def _biases(value: Any) -> Any:
    """Return pairs of token id and bias in the order of the ids; no message shows a key, which is the client's text.

    Raises: ValueError: the value is not what `LogitBias` says.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object with token ids for keys")
    if len(value) > MAX_BIASES:
        raise ValueError(f"holds more than {MAX_BIASES} tokens")
    if not all(_TOKEN_ID.fullmatch(key) for key in value):
        raise ValueError("must have token ids for keys, as decimal digits")
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()):
        raise ValueError("must have numbers from -100 to 100 for values")
    return tuple(sorted((int(key), float(bias)) for key, bias in value.items()))


LogitBias = Annotated[
    tuple[tuple[int, float], ...] | None, BeforeValidator(_biases, json_schema_input_type=dict[str, float] | None)
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Answers = Annotated[int, Field(ge=1, le=8)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class SamplingFields(StrictModel):
    """How the answer is drawn and delivered."""

    max_tokens: TokenCount | None = None
    max_new_tokens: TokenCount | None = Field(None, description="Another name of max_tokens.")
    max_length: TokenCount | None = Field(None, description="Another name of max_tokens.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(None, description="0 keeps all tokens.")
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = Field(None, description="1 is off.")
    stop: _Stop | None = Field(None, description="The answer ends before the first of these texts.")
    stop_sequences: _Stop | None = Field(None, description="Another name of stop.")
    stop_tokens: _Stop | None = Field(None, description="Another name of stop.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description="Makes the answer repeatable.")
    stream: bool = False
    cache: bool = Field(True, description="false: neither read nor fill the response cache.")
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    n: Answers | None = Field(None, description="So many answers, made at once.")
    num_return_sequences: Answers | None = Field(None, description="Another name of n.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Keep the tokens that are at least this share as likely as the likeliest."
    )
    presence_penalty: Penalty | None = Field(None, description="Off the score of each token the answer holds.")
    frequency_penalty: Penalty | None = Field(None, description="The same, once for each time it holds it.")
    logit_bias: LogitBias = Field(None, description="Token id -> what is added to its score, -100 to 100.")
    logprobs: _Logprobs = Field(
        None, description="Report each token's log-probability, and those of this many likely alternatives."
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = Field(
        None, description="The answer ends at any of these tokens too."
    )
    ignore_eos: bool = Field(False, description="Go on after the model's own end tokens.")
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="No end token before the answer has this many."
    )

    def sampling(self) -> Sampling:
        """Translate, with each synonym under its one name.

        Raises: InvalidRequest: two names of one field have different values.
        """
        stop = self._one_of("stop", "stop_sequences", "stop_tokens")
        return Sampling(
            max_tokens=self._one_of("max_tokens", "max_new_tokens", "max_length"),
            temperature=self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            stop=tuple(stop or ()),
            seed=self.seed,
            n=self._one_of("n", "num_return_sequences") or 1,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or (),
            logprobs=self.logprobs,
            stop_token_ids=tuple(sorted(set(self.stop_token_ids or ()))),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens or 0,
        )

    def _one_of(self, *names: str) -> Any:
        given = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        for name, value in given[1:]:
            if value != given[0][1]:
                raise InvalidRequest.of_field(
                    name, f"and {given[0][0]} are two names of one field and have different values"
                )
        return given[0][1] if given else None


def check_length(field: str, length: int, limit: int) -> None:
    """Raises: PromptTooLong: the text has more characters than the service takes."""
    if length > limit:
        raise PromptTooLong(field, length=length, limit=limit)
