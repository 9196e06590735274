"""The fields that every generating route takes: how to sample, and their other names.

Decides ranges and synonyms.  Knows no default of the service: what a client leaves out stays None.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, ValidationInfo

from app.generation.asks import Sampling
from app.web.bodies import StrictModel
from app.web.errors import invalid_field

MAX_TOKENS = 1_000_000
"""Above every context window; how much really fits is the service's to say."""

SessionId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,128}$")]

_TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
_StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Stop = Annotated[
    list[_StopText],
    Field(min_length=1, max_length=16),
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]


def _refuse_value(value: Any, info: ValidationInfo) -> None:
    if value is not None:
        raise invalid_field(str(info.field_name), "is not supported yet by this service")


def _only_one(value: Any, info: ValidationInfo) -> None:
    if type(value) is not int or value != 1:
        _refuse_value(value, info)


_Unsupported = Annotated[None, BeforeValidator(_refuse_value)]
_One = Annotated[None, BeforeValidator(_only_one, json_schema_input_type=int | None)]
"""One completion is what there is, so asking for it is fine."""


class SamplingFields(StrictModel):
    """How the answer is drawn and delivered."""

    max_tokens: _TokenCount | None = None
    max_new_tokens: _TokenCount | None = Field(None, description="Another name of max_tokens.")
    max_length: _TokenCount | None = Field(None, description="Another name of max_tokens.")
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
    n: _One = None
    num_return_sequences: _One = Field(None, description="Another name of n.")
    min_p: _Unsupported = None
    presence_penalty: _Unsupported = None
    frequency_penalty: _Unsupported = None
    logprobs: _Unsupported = None

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
        )

    def _one_of(self, *names: str) -> Any:
        given = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        for name, value in given[1:]:
            if value != given[0][1]:
                raise invalid_field(name, f"and {given[0][0]} are two names of one field and have different values")
        return given[0][1] if given else None


def check_length(field: str, length: int, limit: int) -> None:
    """Raises: InvalidRequest: the text has more characters than the service takes."""
    if length > limit:
        raise invalid_field(field, f"has {length} characters; this service takes at most {limit}")
