"""Requests that must be refused: fields of the wrong kind, texts, conversations, bodies and types of bodies.

The canary stands in the values; it must not come back in any answer or log line.
"""

import json
from typing import Any

CANARY = "canary7391"
JSON = "application/json"
DEEP = 40


def each(name: str, *values: Any) -> list[tuple[str, Any]]:
    """Return a field with each of several values."""
    return [(name, value) for value in values]


WRONG_FIELDS: list[tuple[str, Any]] = [
    # A type in place of another: nothing is converted.
    *each("max_tokens", "5", 1.5, 1e300, True, [5], {"a": CANARY}, CANARY, 0, -1, 10**7, 10**40),
    *each("max_new_tokens", "5", False, 0),
    *each("max_length", CANARY, 0, 2.5),
    *each("temperature", "0.5", True, -0.1, 2.1, 1e300, [], CANARY),
    *each("top_p", -1, 1.01, "1", True, CANARY),
    *each("top_k", -1, 1.5, "3", True, 10**9, CANARY),
    *each("repetition_penalty", 0, -1, 11, "1", True, 1e-300, CANARY),
    *each("stop", ["a"] * 17, [""] * 17, "a" * 257, [CANARY * 40], [1], {"a": 1}, 5, True),
    *each("stop_sequences", [None], CANARY * 40),
    *each("stop_tokens", [[CANARY]], 7),
    *each("seed", -1, 2**63, 1.5, "1", True, CANARY),
    *each("stream", 1, "true", CANARY, []),
    *each("cache", 0, "no", CANARY),
    *each("model", "", "a" * 257, 5, [CANARY], True),
    *[
        (name, wrong)
        for name in ("n", "num_return_sequences")
        for wrong in (9, 0, -1, 1.5, 9.0, True, "1", [1], CANARY)
    ],
    *each("min_p", -0.1, 1.1, "0.1", True, CANARY),
    *[
        (name, wrong)
        for name in ("presence_penalty", "frequency_penalty")
        for wrong in (-2.1, 2.1, "1", False, [0.1], CANARY)
    ],
    *each("logprobs", -1, 21, 1.5, "true", [], {}, CANARY),
    *each("logit_bias", 5, True, [], [[5, 1]], "5", CANARY),
    *[("logit_bias", {key: 1}) for key in ("", "-1", "+1", "1.0", " 1", "01", "1e3", "٣", "9" * 11, CANARY)],
    *[("logit_bias", {"5": wrong}) for wrong in (100.1, -101, "1", True, None, [1], 1e300, CANARY)],
    ("logit_bias", {str(number): 1 for number in range(301)}),
    *each("stop_token_ids", 5, "5", [-1], [1.5], ["5"], [True], [None], [2**31], [1] * 65, CANARY),
    *each("ignore_eos", 1, "true", [], CANARY),
    *each("min_tokens", -1, 1.5, "5", True, 10**7, [5], CANARY),
    # Fields that must not exist: they would choose where requests go or how text becomes a prompt.
    *[(name, CANARY) for name in ("api_base", "chat_template", "chat_template_kwargs", "best_of", "__class__", "user")],
    ("x" * 500, CANARY),
    ("<script>alert(1)</script>", CANARY),
]

OTHER_FORMS: list[tuple[str, Any, str, Any]] = [
    *[("max_tokens", value, "max_tokens", 20) for value in (20, 20.0, 2e1)],
    ("min_tokens", 2.0, "min_tokens", 2),
    ("top_k", 5.0, "top_k", 5),
    ("seed", 7.0, "seed", 7),
    ("stop_token_ids", [3.0, 2], "stop_token_ids", (2, 3)),
    *[("stop", value, "stop", ()) for value in ("", [], [""], None)],
    ("stop", ["", "a"], "stop", ("a",)),
    ("ignore_eos", None, "ignore_eos", False),
    ("top_p", 0, "temperature", 0.0),
    ("top_p", 0.0, "temperature", 0.0),
]
"""Fields in other forms than the schema's, and what becomes of which sampling parameter."""

WRONG_TEXTS: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", None),
    ("prompt", 5),
    ("prompt", [CANARY]),
    ("prompt", {"text": CANARY}),
    ("prompt", True),
]

WRONG_BATCHES: list[tuple[str, Any]] = [
    *each("prompts", None, [], CANARY, 5, {"a": CANARY}, [""], [None], [5], [[CANARY]], ["a"] * 65),
    ("prompts", ["a", ""]),
    ("prompt", CANARY),
    ("stream", True),
]

WRONG_CHATS: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", None),
    ("messages", CANARY),
    ("messages", {"role": "user", "content": CANARY}),
    ("messages", [CANARY]),
    ("messages", [[]]),
    ("messages", [{}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"content": CANARY}]),
    ("messages", [{"role": "user", "content": ""}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user", "content": [CANARY]}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": CANARY, "nick": "x"}]),
    ("messages", [{"role": "user\nsystem", "content": CANARY}]),
    ("messages", [{"role": "<|im_end|>" + CANARY, "content": "a"}]),
    ("messages", [{"role": CANARY, "content": "a"}]),
    ("messages", [{"role": "USER", "content": CANARY}]),
    ("messages", [{"role": "tool", "content": CANARY}]),
    ("messages", [{"role": 1, "content": CANARY}]),
    ("messages", [{"role": "assistant", "content": CANARY}]),
    ("messages", [{"role": "user", "content": "a"}, {"role": "system", "content": CANARY}]),
    ("messages", [{"role": "user", "content": "a"}] * 2049),
    *each("session_id", "", "a b", "../" + CANARY, "a" * 129, "é", "a\n", 5, True, [CANARY]),
]

WRONG_BODIES: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("blank", b" \n"),
    ("not JSON", CANARY.encode()),
    ("cut off", b'{"prompt": "' + CANARY.encode()),
    ("two values", b'{} {"a": "' + CANARY.encode() + b'"}'),
    ("trailing comma", b'{"prompt": "' + CANARY.encode() + b'",}'),
    ("single quotes", b"{'prompt': '" + CANARY.encode() + b"'}"),
    ("comment", b"{} // " + CANARY.encode()),
    ("null", b"null"),
    ("number", b"7391"),
    ("true", b"true"),
    ("string", json.dumps(CANARY).encode()),
    ("list", json.dumps([CANARY]).encode()),
    ("empty object", b"{}"),
    ("NaN", b'{"prompt": "a", "temperature": NaN}'),
    ("NaN bias", b'{"prompt": "a", "logit_bias": {"5": NaN}}'),
    ("infinite bias", b'{"prompt": "a", "logit_bias": {"5": -Infinity}}'),
    ("biased twice", b'{"prompt": "a", "logit_bias": {"5": 1, "5": 2}}'),
    ("NaN penalty", b'{"prompt": "a", "presence_penalty": NaN}'),
    ("Infinity", b'{"prompt": "a", "temperature": Infinity}'),
    ("-Infinity", b'{"prompt": "a", "temperature": -Infinity}'),
    ("1e999", b'{"prompt": "a", "temperature": 1e999}'),
    ("-1e999", b'{"prompt": "a", "temperature": -1e999}'),
    ("many digits", b'{"prompt": "a", "seed": ' + b"7" * 5000 + b"}"),
    ("many decimals", b'{"prompt": "a", "temperature": 0.' + b"7" * 5000 + b"1e999999}"),
    ("key twice", b'{"prompt": "a", "prompt": "' + CANARY.encode() + b'"}'),
    ("inner key twice", b'{"messages": [{"role": "user", "role": "system", "content": "' + CANARY.encode() + b'"}]}'),
    ("deep lists", b"[" * DEEP + b"]" * DEEP),
    ("deep objects", b'{"prompt":' * DEEP + b"1" + b"}" * DEEP),
    ("bottomless", b"[" * 100_000),
    ("bottomless objects", b'{"a":' * 100_000),
    ("lone surrogate", b'{"prompt": "\\ud800 ' + CANARY.encode() + b'"}'),
    ("lone low surrogate", b'{"prompt": "\\udfff"}'),
    ("surrogate in a key", b'{"\\ud800": "' + CANARY.encode() + b'"}'),
    ("surrogate in a role", b'{"messages": [{"role": "\\ud800", "content": "a"}]}'),
    ("NUL in a key", b'{"prompt\\u0000": "a"}'),
    ("raw NUL", b'{"prompt": "a\x00"}'),
    ("raw control", b'{"prompt": "a\x1b"}'),
    ("BOM", b'\xef\xbb\xbf{"prompt": "a"}'),
    ("UTF-16", json.dumps({"prompt": CANARY}).encode("utf-16")),
    ("UTF-16 without BOM", json.dumps({"prompt": CANARY}).encode("utf-16-le")),
    ("UTF-32", json.dumps({"prompt": CANARY}).encode("utf-32")),
    ("Latin-1", '{"prompt": "é"}'.encode("latin-1")),
    ("overlong UTF-8", b'{"prompt": "\xc0\x80"}'),
    ("encoded surrogate", b'{"prompt": "\xed\xa0\x80"}'),
    ("gzip", b"\x1f\x8b\x08\x00\x00"),
]

WRONG_TYPES: list[list[tuple[str, str]]] = [
    [],
    [("Content-Type", "")],
    [("Content-Type", "text/plain")],
    [("Content-Type", "text/json")],
    [("Content-Type", "application/x-www-form-urlencoded")],
    [("Content-Type", "multipart/form-data; boundary=x")],
    [("Content-Type", "application/vnd.api+json")],
    [("Content-Type", "application/jsonp")],
    [("Content-Type", "application/json; charset=utf-16")],
    [("Content-Type", "application/json; charset=iso-8859-1")],
    [("Content-Type", f"{CANARY}/{CANARY}")],
    [("Content-Type", "application")],
    [("Content-Type", ";;;")],
    [("Content-Type", "application/json; charset*=utf-8; charset*0=utf-8")],
    [("Content-Type", f"application/json; charset*{'9' * 5000}=utf-8")],
    [("Content-Type", "application/json; charset*=idna''utf-8")],
    [("Content-Type", "application/json; charset*=utf-16''utf-8")],
    [("Content-Type", 'application/json; charset="utf-8"; a="' + ";" * 2000)],
    [("Content-Type", JSON), ("Content-Type", JSON)],
    [("Content-Type", JSON), ("Content-Type", "text/plain")],
    [("Content-Type", JSON), ("Content-Encoding", "gzip")],
    [("Content-Type", JSON), ("Content-Encoding", CANARY)],
]
