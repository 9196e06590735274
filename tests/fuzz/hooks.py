"""What schemathesis is told of this service; it loads this module in its own process.

A JSON schema describes fields one by one.  Where a request is right field by field and still refused, because two
fields contradict each other or the loaded model cannot do it, the refusal has to give one of the reasons below.
"""

import re
from typing import Any

import schemathesis
from schemathesis import Case, HookContext, Response

OWN_REASONS = {
    "/v1/chat$": ["the last message must be the user's", "content must not be empty"],
    "/v1/(chat|responses)": [
        "must be the opposite of continue_final_message",
        "needs a last message of the assistant",
        "tool_call_id belongs to a message of the role tool, and to no other",
        "belong to messages of the role assistant",
        "a part of the type [a-z_]+ needs the field",
        "a message of the role [a-z]+ needs",
        "must be a text or a list of text parts",
        "messages must end with the user's (or a tool's )?in a session",
        "n must be 1 in a session",
        "and the header X-Session-ID name two sessions",
        "are two forms of one field",
        "is no variable of this model's chat template",
        "is not supported: this model's chat template",
        "names a function that is not among",
        "is the name of another one too",
        "is only possible with",
        "of the last turn, which is never cut",
    ],
    "/v1/(chat/)?completions": [
        "must be n: this service returns all answers that it makes",
        "needs include_usage",
        "nothing is asked of the prompt",
    ],
    "/v1/responses": [
        "name two conversations",
        "names no stored response of yours",
        "names no item of a stored response of yours",
        "is not possible here: a stored response is complete",
    ],
    "/v1/embeddings": ["must leave a token", "must not hold an empty text", "input_type needs texts"],
    "/tokenize": [
        "needs either prompt or messages",
        "is needed where [a-z_]+ is given",
        "must be the opposite of continue_final_message",
        "needs a last message of the assistant",
        "tool_call_id belongs to a message of the role tool, and to no other",
        "belong to messages of the role assistant",
        "a part of the type [a-z_]+ needs the field",
        "a message of the role [a-z]+ needs",
        "must be a text or a list of text parts",
        "is no variable of this model's chat template",
        "is not supported: this model's chat template",
    ],
    "/v1/(files|batches)": [
        "names no file of yours",
        "The url of the first line must be",
        "The body is not the form of an upload",
        "must be one file, sent with its name",
    ],
    "/v1/models/load": [
        "is needed, since the model's own name has other signs",
        "needs `source`: without it a model is loaded as it is configured",
    ],
    "/v1/adapters/load": ["names a model that takes no adapters"],
    "/(generate|predict)": ["must be at most [0-9]+ on this route"],
}
"""Reasons of two fields that stand together on some paths only: a path's beginning -> what it may say."""
REASONS = [
    # Two fields.
    "are two names of one field and have different values",
    "have different values",
    "is only possible where",
    "is not possible together with",
    "is not possible with truncation disabled",
    "is required where",
    "min_tokens is more than max_tokens",
    # The model, and the configured limits.
    "holds no token for this model",
    "may only name control tokens where completions are filtered",
    "names a token that the model does not have",
    "has [0-9]+ characters; this service takes at most",
    "maximum context length is",
    "names a model that (does not embed|only embeds)",
    "is not supported for this model",
    # What only a look at the texts can tell.
    "is not valid JSON of at most",
    "must be a JSON Schema, which is an object",
]
"""Reasons of every path."""


def may_say(path: str, text: str) -> bool:
    """Return whether a path refuses requests whose fields are right one by one with these words."""
    own = [reason for beginning, reasons in OWN_REASONS.items() if re.match(beginning, path) for reason in reasons]
    return re.search("|".join([*REASONS, *own]), text) is not None


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
    if response.status_code == 413 and type(failure).__name__ in ("RejectedPositiveData", "AcceptedNegativeData"):
        return False  # refused for its length, before anything of it is looked at
    if type(failure).__name__ != "RejectedPositiveData":
        return True
    if response.status_code == 424:
        return not re.search("/v1/models/load$|/load_model$", case.path)  # there is no model of this name to load
    if response.status_code != 400:
        return True
    if _has_integral_float(case.body) and NO_INTEGER.search(response.text):
        return False
    return not may_say(case.path, response.text)


@schemathesis.hook
def filter_case(context: HookContext, case: Case[Any]) -> bool:
    """Leave alone the role of the key that fuzzing itself uses, and the model that it calls."""
    body: Any = case.body
    if case.path == "/v1/models/unload" and isinstance(body, dict) and body.get("model_name") == "echo":
        return False
    return (case.path_parameters or {}).get("name") != "admin"
