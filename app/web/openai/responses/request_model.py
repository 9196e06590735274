"""The body of POST /v1/responses: each of OpenAI's fields is honoured, changes nothing, or is refused by its name."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from app.errors import InvalidRequest
from app.types import Grammar
from app.web.http.json_body import StrictModel
from app.web.http.sampling_params import AdapterField, SessionId, TokenCount, split_params
from app.web.http.structured_output import ANY_OBJECT, json_grammar
from app.web.http.template_kwargs import ReasoningEffort
from app.web.http.tool_definitions import MAX_TOOLS, FunctionDefinition, ToolChoiceField, tool_fields
from app.web.openai.request_model import Name
from app.web.openai.responses.items import MAX_ITEMS, InputItem, ItemId
from app.web.openai.validators import Metadata, NeutralOnly

LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class FunctionTool(FunctionDefinition):
    """A function that the model may ask for."""

    type: Literal["function"]
    defer_loading: Annotated[Any, NeutralOnly(False)] = None
    allowed_callers: Annotated[Any, NeutralOnly(["direct"])] = None
    output_schema: Annotated[dict[str, Any] | None, Field()] = None
    async_: Annotated[Any, NeutralOnly(False), Field(alias="async")] = None


def _only_functions(value: Any) -> Any:
    """Raises: ValueError: a tool that OpenAI runs itself, which nothing here does."""
    for tool in value if isinstance(value, list) else ():
        if isinstance(tool, dict) and tool.get("type") != "function":
            raise ValueError("may only hold tools of type function: this service runs no tools itself")
    return value


class PlainText(StrictModel):
    """Leaves the text free."""

    type: Literal["text"]


class JsonObject(StrictModel):
    """Asks for any JSON object."""

    type: Literal["json_object"]


class JsonSchema(StrictModel):
    """Asks for JSON that follows a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


_Format = Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")]


class TextSettings(StrictModel):
    """What the text looks like."""

    format: _Format | None = None
    verbosity: Annotated[Any, NeutralOnly("medium")] = None

    @property
    def grammar(self) -> Grammar | None:
        match self.format:
            case JsonObject():
                return json_grammar("text.format", ANY_OBJECT)
            case JsonSchema(schema_=schema):
                return json_grammar("text.format.schema", schema)
        return None


class ReasoningSettings(StrictModel):
    """How much a reasoning model thinks."""

    effort: ReasoningEffort | None = None
    summary: Annotated[Any, NeutralOnly("auto", "detailed", "concise")] = None
    generate_summary: Annotated[Any, NeutralOnly("auto", "detailed", "concise")] = None
    context: Annotated[Any, NeutralOnly("auto")] = None
    mode: Annotated[Any, NeutralOnly("auto")] = None


class StreamSettings(StrictModel):
    """What a stream holds beside its events."""

    include_obfuscation: Annotated[Any, NeutralOnly(False)] = None


class ConversationId(StrictModel):
    """Names a conversation."""

    id: SessionId


_Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]
_Text = Annotated[str, StringConstraints(min_length=1)]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) and value else value


_ShortText = Annotated[str, StringConstraints(max_length=512)]


class ResponseRequest(StrictModel):
    """A request for a response."""

    may_ignore_fields: ClassVar[bool] = True

    input: Annotated[_Items, BeforeValidator(_as_items, json_schema_input_type=_Text | _Items)]
    model: Name | None = None
    adapter: AdapterField = None
    instructions: str | None = Field(None, description="A system message of this response only.")
    max_output_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[_INCLUDABLE], Field(max_length=8)] | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS), BeforeValidator(_only_functions)] | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningSettings | None = None
    previous_response_id: ItemId | None = Field(None, description="Continues the conversation of this stored response.")
    conversation: SessionId | ConversationId | None = Field(
        None, description="Continues the caller's own session of this name, in place of previous_response_id."
    )
    store: bool | None = Field(None, description="false keeps nothing; by default the response can be continued.")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto leaves the oldest turns out where all do not fit."
    )
    stream: bool | None = None
    stream_options: StreamSettings | None = None
    metadata: Metadata = None
    user: _ShortText | None = None
    safety_identifier: _ShortText | None = None
    service_tier: Annotated[str | None, NeutralOnly("auto", "default")] = None
    prompt_cache_key: _ShortText | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: Annotated[dict[str, Any] | None, Field()] = None

    access_programs: Annotated[Any, NeutralOnly({})] = None
    background: Annotated[Any, NeutralOnly(False)] = None
    context_management: Annotated[Any, NeutralOnly([])] = None
    image: Annotated[Any, NeutralOnly({})] = None
    max_tool_calls: Annotated[Any, NeutralOnly()] = None
    moderation: Annotated[Any, NeutralOnly()] = None
    prompt: Annotated[Any, NeutralOnly()] = None

    @property
    def session_id(self) -> str | None:
        """The session that `conversation` names."""
        named = self.conversation
        return named.id if isinstance(named, ConversationId) else named

    @property
    def logprobs(self) -> int | None:
        """How many alternatives are reported with each token; None for no log-probabilities."""
        if self.top_logprobs:
            return self.top_logprobs
        return 0 if LOGPROBS in (self.include or ()) else None

    def check(self) -> None:
        """Raises: InvalidRequest: fields contradict each other."""
        if self.conversation is not None and self.previous_response_id is not None:
            raise InvalidRequest.of_field("conversation", "and previous_response_id name two conversations")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest.of_field("stream_options", "is only possible where stream is true")

    def offered(self) -> dict[str, Any]:
        """Return the request's fields that say what the model may call.

        Raises: InvalidRequest: the tools or the choice among them are not valid.
        """
        parallel = self.parallel_tool_calls is not False
        return tool_fields(self.tools or (), self.tool_choice, parallel=parallel, name_path="name")

    def sampling(self) -> dict[str, Any]:
        """Return the request's fields that say how it is sampled."""
        sampling, unset = split_params(
            {
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "logprobs": self.logprobs,
                "grammar": None if self.text is None else self.text.grammar,
            }
        )
        return {"sampling": sampling, "unset": unset}
