"""Request fields of OpenAI's, vLLM's and llama.cpp's clients that change no completion of this service.

Some are hints about caches, billing and bookkeeping, and take any value that their own API takes.  The others ask for
something only with one value: they take the value with which they do not, and any other is refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from app.web.http.json_body import StrictModel
from app.web.openai.validators import Metadata, NeutralOnly

_HINT_CHARS = 512
_Hint = Annotated[str, StringConstraints(max_length=_HINT_CHARS)]


class NeutralFields(StrictModel):
    """Fields that both routes accept, and that nothing but a response or the log shows."""

    metadata: Metadata = Field(None, description="Returned in the response of a chat, unless that is a stream.")
    prompt_cache_key: _Hint | None = Field(None, description="A hint: a prefix is reused whatever its key.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="A hint, as prompt_cache_key is.")
    prompt_cache_retention: _Hint | None = Field(None, description="A hint: nothing is retained for longer.")
    safety_identifier: _Hint | None = Field(None, description="The newer name of user, and preferred to it.")
    service_tier: _Hint | None = Field(None, description="A hint: there is one tier, and the response says default.")
    store: bool | None = Field(None, description="A hint: completions are not stored for later retrieval.")
    user: _Hint | None = Field(None, description="The caller's end user; the log shows a hash of it.")
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="A hint: the model is not told.")

    cache_prompt: Annotated[Any, NeutralOnly(True)] = None
    detokenize: Annotated[Any, NeutralOnly(True)] = None
    early_stopping: Annotated[Any, NeutralOnly(False)] = None
    include_stop_str_in_output: Annotated[Any, NeutralOnly(False)] = None
    length_penalty: Annotated[Any, NeutralOnly(1)] = None
    mirostat: Annotated[Any, NeutralOnly(0)] = None
    repeat_penalty: Annotated[Any, NeutralOnly(1)] = None
    return_token_ids: Annotated[Any, NeutralOnly(False)] = None
    return_tokens_as_token_ids: Annotated[Any, NeutralOnly(False)] = None
    skip_special_tokens: Annotated[Any, NeutralOnly(True)] = None
    spaces_between_special_tokens: Annotated[Any, NeutralOnly(True, False)] = None
    tfs_z: Annotated[Any, NeutralOnly(1)] = None
    truncation_side: Annotated[Any, NeutralOnly("left")] = None
    typical_p: Annotated[Any, NeutralOnly(1)] = None
    use_beam_search: Annotated[Any, NeutralOnly(False)] = None
