"""What each kind of server understands beside OpenAI's own fields, and how a list of models shows which kind it is.

The one place that tells servers apart; what is written and read follows from these facts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from app.config.remote import ServerName
from app.types import SamplingParams

_OPENAI: Final = frozenset(
    [
        *("max_tokens", "temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty"),
        *("logit_bias", "logprobs", "grammar", "sample"),
    ]
)
_VLLM: Final = _OPENAI | {"top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"}
_TRANSFORMERS: Final = frozenset(["max_tokens", "temperature", "top_p", "stop", "seed", "sample"])
_LLAMA: Final = _OPENAI | {"top_k", "min_p", "repetition_penalty", "ignore_eos"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One kind of server."""

    name: ServerName
    sampling: frozenset[str] = _OPENAI
    """Sampling parameters that it honours."""
    field_names: tuple[tuple[str, str], ...] = ()
    """What it calls those that it has another name for."""
    neutral: tuple[tuple[str, Any], ...] = ()
    """What it takes as switched off where that is not our own value; None is left out."""
    structured: Literal["structured_outputs", "json_schema", "json_object"] = "json_schema"
    """How it is told what a completion must look like: by vLLM's field, or in OpenAI's `response_format` with the
    schema in one of the two places."""
    regex_field: bool = False
    """Whether a regular expression has a field of its own."""
    names_stops: bool = False
    """Whether the end of a stream says which stop string matched; otherwise they are looked for here."""
    counts_on: bool = False
    """Whether each chunk may say how many tokens there are up to it."""
    takes_tokens: bool = False
    """Whether a prompt may be token ids."""
    tokenizes: bool = False
    """Whether it has vLLM's routes /tokenize and /detokenize."""
    template_kwargs: bool = False
    """Whether a request may set variables of the chat template, and say how long the model is to think."""
    continues: bool = False
    """Whether it can continue the last message."""
    reads_prompts: bool = False
    """Whether it takes a request for no token at all."""
    forces_tools: bool = True
    """Whether a request may say that a tool must be called, or none."""
    lists_model: bool = True
    """Whether its list of models has the one that it serves; otherwise the configuration has to name that."""

    @property
    def grammars(self) -> frozenset[str]:
        """Return the kinds of grammars that it follows in chats."""
        if self.structured == "structured_outputs":
            return frozenset(["json_schema", "regex", "lark"])
        return frozenset(["json_schema", "regex"] if self.regex_field else ["json_schema"])

    @property
    def unsupported(self) -> frozenset[str]:
        """Return the names of the sampling parameters that it lacks."""
        return frozenset(each.name for each in fields(SamplingParams)) - self.sampling


OURS: Final = Server(
    name="llm-service",
    sampling=_VLLM,
    structured="structured_outputs",
    names_stops=True,
    counts_on=True,
    takes_tokens=True,
    tokenizes=True,
    template_kwargs=True,
    continues=True,
    reads_prompts=True,
)
SERVERS: Final[Mapping[str, Server]] = {
    each.name: each
    for each in (
        OURS,
        Server(
            name="vllm",
            sampling=_VLLM,
            structured="structured_outputs",
            names_stops=True,
            counts_on=True,
            takes_tokens=True,
            tokenizes=True,
            template_kwargs=True,
            continues=True,
        ),
        Server(
            name="sglang",
            sampling=_VLLM,
            neutral=(("top_k", -1),),
            regex_field=True,
            takes_tokens=True,
            template_kwargs=True,
            continues=True,
        ),
        Server(
            name="llama.cpp",
            sampling=_LLAMA,
            field_names=(("repetition_penalty", "repeat_penalty"),),
            structured="json_object",
        ),
        Server(name="tgi", sampling=_OPENAI - {"logit_bias"}, neutral=(("top_p", None),)),
        Server(name="ollama", sampling=_OPENAI - {"logit_bias"}),
        # Takes many more fields and ignores them; its list is of the hub's folder on its disk.
        Server(name="transformers", sampling=_TRANSFORMERS, forces_tools=False, lists_model=False),
        Server(name="openai"),
    )
}
_OWNERS: Final[Mapping[str, str]] = {
    "llm-service": "llm-service",
    "vllm": "vllm",
    "sglang": "sglang",
    "llamacpp": "llama.cpp",
    "me": "llama.cpp",
    "library": "ollama",
}
"""What stands as `owned_by` in the list of models -> the server that writes it; `me` is llama-cpp-python."""


def detect_server(owned_by: str | None) -> Server:
    """Return the kind of server that lists a model so; nothing but OpenAI's own fields for one that is not known."""
    return SERVERS[_OWNERS.get(owned_by or "", "openai")]
