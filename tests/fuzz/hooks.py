"""What schemathesis is told of this service; it loads this module in its own process.

A JSON schema describes fields one by one.  Where a request is right field by field and still refused, because two
fields contradict each other or the loaded model cannot do it, the refusal has to give one of the reasons below.
"""

import re
from typing import Any

import schemathesis
from schemathesis import Case, HookContext, Response

REASONS = re.compile(
    "|".join(
        [
            # Two fields, or a field and a header.
            "are two names of one field and have different values",
            "and the header X-Session-ID name two sessions",
            "is only possible where",
            "must be the opposite of continue_final_message",
            "needs a last message of the assistant",
            "must be n: this service returns all answers that it makes",
            "is not possible with logprobs",
            "needs include_usage",
            "tool_call_id belongs to a message of the role tool, and to no other",
            "the last message must be the user's",
            "messages must end with the user's (or a tool's )?in a session",
            "names a model that takes no adapters",
            "n must be 1 in a session",
            "min_tokens is more than max_tokens",
            # The model, and the configured limits.
            "holds no token for this model",
            "may only name control tokens where completions are filtered",
            "names a token that the model does not have",
            "has [0-9]+ characters; this service takes at most",
            "maximum context length is",
            "must be at most [0-9]+ on this route",
            "is not possible with truncation disabled",
            "of the last turn, which is never cut",
            # One of two fields, or a field that another one needs.
            "needs either prompt or messages",
            "is needed where [a-z_]+ is given",
            "is no variable of this model's chat template",
            "a part of the type [a-z_]+ needs the field",
            "a message of the role [a-z]+ needs",
            "names a model that (does not embed|only embeds)",
            "must be a text or a list of text parts",
            "belong to messages of the role assistant",
            "input_type needs texts",
            "is only possible with",
            "is not possible together with",
            "is required where",
            "are two forms of one field",
            "name two conversations",
            "names an item that stands here already",
            "nothing is asked of the prompt",
            "must leave a token",
            "names a function that is not among",
            "is the name of another one too",
            "have different values",
            "is not supported for this model",
            "is not supported: this model's chat template",
            "is needed, since the model's own name has other signs",
            "is not possible with stream",
            # What only a look at the texts, or at what is stored, can tell.
            "must not hold an empty text",
            "content must not be empty",
            "is not valid JSON of at most",
            "must be a JSON Schema, which is an object",
            "names no stored response of yours",
            "names no item of a stored response of yours",
            "is not possible here: a stored response is complete",
            "names no file of yours",
            "The url of the first line must be",
            "The body is not the form of an upload",
            "must be one file, sent with its name",
        ]
    )
)
NO_INTEGER = re.compile("Input should be a valid integer|prompt: must be a text, a list of texts, a list of token ids")


def _has_integral_float(value: Any) -> bool:
    """Return whether a number is written as 2.0: an integer to JSON Schema, and no integer here."""
    if isinstance(value, dict):
        return any(map(_has_integral_float, value.values()))
    if isinstance(value, list):
        return any(map(_has_integral_float, value))
    return isinstance(value, float) and value.is_integer()


@schemathesis.hook
def filter_failure(context: HookContext, failure: Exception, case: Case[Any], response: Response) -> bool:
    """Return whether a finding counts."""
    if type(failure).__name__ == "UseAfterFree" and case.path.startswith("/v1/keys/"):
        return False  # a revoked key stays in the list, with its state
    if type(failure).__name__ == "RejectedPositiveData" and response.status_code == 424:
        return False  # there is no model of this name to load
    if response.status_code == 413:
        return False  # refused for its length, before anything of it is looked at
    if type(failure).__name__ != "RejectedPositiveData" or response.status_code != 400:
        return True
    if _has_integral_float(case.body) and NO_INTEGER.search(response.text):
        return False
    return REASONS.search(response.text) is None


@schemathesis.hook
def filter_case(context: HookContext, case: Case[Any]) -> bool:
    """Leave alone the role of the key that fuzzing itself uses, and the model that it calls."""
    body: Any = case.body
    if case.path == "/v1/models/unload" and isinstance(body, dict) and body.get("model_name") == "echo":
        return False
    return (case.path_parameters or {}).get("name") != "admin"
