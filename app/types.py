"""The words that every layer shares.  Frozen values, no behaviour beyond arithmetic on themselves."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal

import msgspec


class Role(StrEnum):
    """Who speaks in a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    """The result of a tool that the assistant called."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function that the assistant asks the client for."""

    id: str
    name: str
    arguments: str
    """The arguments as JSON text, as the model wrote it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str
    """Empty where the assistant only calls tools."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that the assistant made in this message."""
    tool_call_id: str | None = None
    """Which call a message of the role tool answers."""
    reasoning: str | None = None
    """What the assistant thought before it answered."""
    name: str | None = None
    """Who of several speaks; of a tool's result the function's name."""

    @property
    def all_text(self) -> str:
        """Return everything in it that somebody wrote: reasoning, text and the arguments of calls."""
        return (self.reasoning or "") + self.content + "".join(call.arguments for call in self.tool_calls)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask the client to call."""

    name: str
    description: str | None = None
    parameters: str = "{}"
    """JSON Schema of the arguments, as JSON text."""
    strict: bool = False
    """Whether the arguments of a call must follow the schema even where the model is free to call or not."""


ToolMode = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must or must not call tools."""

    mode: ToolMode = "auto"
    name: str | None = None
    """With `required`: the one tool that must be called."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a completion must look like; the sampler allows no token that leads elsewhere."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    """A JSON Schema as JSON text, a regular expression, or a grammar in llguidance's dialect of Lark."""
    json_marks: tuple[str, ...] = ()
    """What begins JSON in a completion that is free text otherwise."""

    @property
    def is_json(self) -> bool:
        """Return whether the whole completion is one JSON value."""
        return self.kind == "json_schema"


class EngineState(StrEnum):
    """The state of an engine."""

    LOADING = "loading"
    READY = "ready"
    UNRESPONSIVE = "unresponsive"
    """The worker gives no sign of life; it serves again when it does, or is killed."""
    RESTARTING = "restarting"
    """The worker died and is being started again."""
    FAILED = "failed"
    """The model cannot be loaded; `EngineStatus.error` says why."""
    CLOSED = "closed"


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The model ended the completion, or a stop string matched."""
    TOOL_CALLS = "tool_calls"
    """The model ended the completion, in which it calls tools."""
    LENGTH = "length"
    """max_tokens or the context window was reached."""
    CONTENT_FILTER = "content_filter"
    """The output filter failed, so nothing more was let out."""
    ABORT = "abort"
    """The service ended it (shutdown); what came before is valid text."""

    @property
    def is_complete(self) -> bool:
        """Return whether the completion ended by itself, so that it may be stored and continued."""
        return self in (FinishReason.STOP, FinishReason.TOOL_CALLS, FinishReason.LENGTH)


BACKGROUND_PRIORITY = 1 << 16
"""From this number on a request's priority is that of batches: the model computes it where nothing else is to do, and
now and then beside the rest.  No caller can name such a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters.  Defaults are neutral: they leave the model's distribution as it is."""

    max_tokens: int = 1
    """At most this many new tokens, >= 1; 0 computes the prompt and generates nothing."""
    temperature: float = 0.0
    """0 is greedy: always the most likely token."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this probability mass, in (0, 1]."""
    top_k: int = 0
    """Keep this many tokens; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides the score of tokens already seen; 1 is off."""
    stop: tuple[str, ...] = ()
    """The completion ends before the first of these texts."""
    seed: int | None = None
    """The same seed and request give the same completion."""
    min_p: float = 0.0
    """Keep the tokens that are at least this share of the most likely one's probability, in [0, 1]; 0 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the score of each token that the completion already has, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from the score of a token for each time that the completion already has it, in [-2, 2]."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the scores of these token ids; each bias in [-100, 100]."""
    logprobs: int | None = None
    """Report each token's log-probability, and those of this many most likely tokens, 0 to 20; None is off."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt, of which the first has none."""
    stop_token_ids: tuple[int, ...] = ()
    """The completion ends at any of these tokens, beside the model's own end tokens."""
    ignore_eos: bool = False
    """Go on after the model's own end tokens."""
    min_tokens: int = 0
    """No end token is sampled before the completion has this many tokens."""
    grammar: Grammar | None = None
    """What the completion must look like; None leaves it free."""
    sample: int = 0
    """Which of several samples of one request this is, from 0; each draws differently from one seed."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of a text and how likely the model found it, before any sampling setting changed the scores."""

    token_id: int
    logprob: float
    """Natural logarithm of the probability, <= 0."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens here and their log-probabilities, most likely first; as many as were asked for."""
    rank: int = 0
    """How many tokens are at least as likely, 1 for the likeliest; 0 where it is not computed: in completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """How long a step of the model takes on this machine in each way of execution, as measured when it was loaded."""

    kind: Literal["decode", "prompt"]
    """decode: one token of each of several sequences; prompt: several tokens of one, or both kinds together."""
    tokens: int
    way: str
    """The way that computes such steps."""
    milliseconds: dict[str, float]
    """By way, of those that were measured: slow ones are not with long prompts."""

    def __str__(self) -> str:
        """Describe it in one line, the way that is used first."""
        taken = {self.way: self.milliseconds.get(self.way), **self.milliseconds}
        ways = [way if each is None else f"{way} {each:g} ms" for way, each in taken.items()]
        return f"{self.kind} {self.tokens}: " + "; ".join(ways)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, counted with the model's own tokenizer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that did not have to be computed again."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one key; 0 is no limit."""

    monthly_tokens: int = 0
    """Tokens of prompts and completions in a calendar month, UTC."""
    requests_per_minute: int = 0
    """Requests that flow back into the key's bucket in a minute."""
    burst: int = 0
    """Requests of a full bucket; 0 takes one minute's."""
    tokens_per_minute: int = 0
    parallel_requests: int = 0
    """Requests that run at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """Rights of a key beside generating."""

    models: tuple[str, ...] | None = None
    """Names of the models that it may use; None allows all."""
    load_models: bool = False
    manage_keys: bool = False
    """Manage keys and roles, and read everybody's usage."""
    system_messages: bool = True
    """Send messages of the role system, and what else stands in them: tools, texts for the chat template."""
    raw_logprobs: bool = True
    """Ask for log-probabilities."""
    control_tokens: bool = True
    """Send prompts of token ids with control tokens in them.  Nothing without `system_messages`: whoever writes control
    tokens writes a message of any role."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who owns sessions, cached responses, KV cache rows and a share of the model.

    The kind is a part of the value: whatever an owner is called, it is neither a key nor the configured key.  Made by
    the constructors below and never from a text.
    """

    kind: Literal["owner", "key", "configured", "program"]
    name: str = ""

    @classmethod
    def owner(cls, name: str) -> "Tenant":
        """Return the tenant that all keys of this owner share."""
        return cls("owner", name)

    @classmethod
    def key(cls, key_id: str) -> "Tenant":
        """Return the tenant of a key that has no owner."""
        return cls("key", key_id)

    @classmethod
    def configured(cls) -> "Tenant":
        """Return the tenant of the configured key."""
        return cls("configured")

    @classmethod
    def program(cls) -> "Tenant":
        """Return the tenant of code that uses an engine itself, without any key."""
        return cls("program")

    def __str__(self) -> str:
        """Return the text for other processes and stores: `owner:anna`, `key:hhDqXM5S`, `configured`, `program`.

        Two tenants never have the same text, since a kind has no colon in it.
        """
        return f"{self.kind}:{self.name}" if self.kind in ("owner", "key") else self.kind


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller: the owner of a valid API key.  Never holds the key itself."""

    key_id: str
    """Public name of the key, safe to log."""
    tenant: Tenant
    """Owns sessions and cached responses; keys of one owner share them."""
    role: str = "standard"
    limits: Limits = Limits()
    rights: Rights = Rights()


class InferenceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the inference log: a request and how it ended."""

    created: datetime
    request_id: str
    key_id: str
    route: str
    model: str | None
    """None: the request ended before its model was known."""
    revision: str | None
    adapter: str | None
    prompt_tokens: int
    completion_tokens: int
    charged_tokens: int
    """Tokens charged to the month of its key."""
    counted: bool
    """Whether the quota has counted that already."""
    cached: bool
    finish_reason: FinishReason | None
    """None: the completion did not end by itself."""
    status: int
    """The HTTP status that fits; 499 for a client that hung up."""
    first_token_ms: float | None
    latency_ms: float
    prompt: str | None = None
    answer: str | None = None
    cut_at: tuple[int, ...] = ()
    """Where in `answer` a sample ends that broke off; an entity may have begun there."""
