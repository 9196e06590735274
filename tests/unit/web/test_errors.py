"""How errors look to a client."""

import json
from datetime import UTC, datetime

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

from app.errors import (
    EngineBusy,
    InternalError,
    InvalidRequest,
    NotFound,
    PiiBlocked,
    RateLimited,
    Unauthorized,
)
from app.web.http.errors import ErrorRenderer, as_app_error, envelope, error_responses, format_traceback

SCOPE = {"type": "http", "path": "/v1/chat", "state": {"request_id": "r1"}}


def test_the_envelope_has_its_five_fields():
    before = datetime.now(UTC).replace(microsecond=0)

    body = envelope(InvalidRequest("No.", details={"a": 1}), "r1")

    assert before <= datetime.fromisoformat(body.pop("timestamp")) <= datetime.now(UTC)
    assert {"error": "validation_error", "message": "No.", "details": {"a": 1}, "request_id": "r1"} == body


@pytest.mark.parametrize(("seconds", "header"), [(0, "1"), (0.01, "1"), (1, "1"), (1.01, "2"), (29.5, "30")])
def test_retry_after_is_whole_seconds_rounded_up(seconds, header):
    assert header == ErrorRenderer({}).response(SCOPE, RateLimited("x", retry_after=seconds)).headers["retry-after"]


def test_every_503_says_when_to_come_back_and_what_never_helps_does_not():
    """Where the error itself cannot tell, the usual time is sent."""
    assert "5" == ErrorRenderer({}).response(SCOPE, EngineBusy("x")).headers["retry-after"]
    assert "retry-after" not in ErrorRenderer({}).response(SCOPE, InvalidRequest("x")).headers


def test_401_tells_how_to_authenticate_and_no_other_does():
    assert "Bearer" == ErrorRenderer({}).response(SCOPE, Unauthorized("x")).headers["www-authenticate"]
    assert "www-authenticate" not in ErrorRenderer({}).response(SCOPE, NotFound("x")).headers


def test_only_messages_about_the_schema_are_passed_on():
    """pydantic quotes the input in some messages; for those only the field is named."""

    class Model(BaseModel):
        value: int

    with pytest.raises(ValidationError) as raised:
        TypeAdapter(Model).validate_python({"value": "canary"})
    lax = [{**error, "loc": ("body", *error["loc"])} for error in raised.value.errors()]
    tagged = {
        "type": "union_tag_invalid",
        "loc": ("body", "role"),
        "msg": "Input tag 'canary' found using 'role' does not match",
        "ctx": {"tag": "canary"},
        "input": "canary",
    }

    error = as_app_error(RequestValidationError([*lax, tagged]))

    assert isinstance(error, InvalidRequest)
    assert [("value", "is not valid"), ("role", "is not valid")] == [
        (item["field"], item["reason"]) for item in error.details["errors"]
    ]
    assert "canary" not in error.message + str(error.details)


@pytest.mark.parametrize("name", ["\x1b[31m<b>" + "é" * 500, "4111 1111", "a" * 41, "über", "A", ""])
def test_names_of_unknown_fields_are_words_or_not_shown(name):
    unknown = {"type": "extra_forbidden", "loc": ("body", "messages", 3, name), "msg": "x", "input": 1}

    error = as_app_error(RequestValidationError([unknown]))

    (named,) = error.details["errors"]
    assert ("messages.3", "holds a field that does not exist, whose name is not shown") == (
        named["field"],
        named["reason"],
    )


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (404, (404, "not_found")),
        (405, (405, "method_not_allowed")),
        (413, (413, "payload_too_large")),
        (415, (415, "unsupported_media_type")),
        (400, (400, "bad_request")),
    ],
)
def test_the_frameworks_errors_get_our_codes_and_not_its_texts(status, expected):
    error = as_app_error(HTTPException(status, detail="canary"))

    assert expected == (error.status, error.code)
    assert "canary" not in error.message


def test_a_defect_is_told_as_nothing_but_that():
    error = as_app_error(ValueError("canary"))

    assert isinstance(error, InternalError)
    assert "canary" not in error.message + str(error.details)


def test_a_trace_shows_places_and_causes_but_no_messages():
    def inner() -> None:
        raise KeyError("canary")

    text = ""
    try:
        try:
            inner()
        except KeyError as cause:
            raise ValueError("canary too") from cause
    except ValueError as error:
        text = format_traceback(error)

    assert "in inner" in text
    assert text.index("ValueError") < text.index("KeyError")
    assert "canary too" not in text.replace('raise ValueError("canary too")', "")


class TeapotFormat:
    """A dialect that names nothing but the error's code."""

    schema = BaseModel

    def body(self, error, *, path, request_id):
        return {"teapot": error.code, "path": path, "id": request_id}

    def headers(self, error):
        return {"x-teapot": "short"}

    def missing(self, path, served):
        return f"no {path}, but {sorted(served)}"

    def code_of(self, kind):
        return f"teapot_{kind.code}"


@pytest.mark.parametrize(
    ("path", "registered"),
    [("/tea", True), ("/tea/", True), ("/tea/pot", True), ("/teapot", False), ("/v1/tea", False), ("/", False)],
)
def test_a_registered_format_writes_the_errors_of_its_prefix_and_of_no_other_path(path, registered):
    response = ErrorRenderer({"/tea": TeapotFormat()}).response({**SCOPE, "path": path}, RateLimited("x"), {"a": "b"})

    assert (429, "b") == (response.status_code, response.headers["a"])
    assert registered == (
        json.loads(bytes(response.body)) == {"teapot": "rate_limit_exceeded", "path": path, "id": "r1"}
    )
    assert registered == ("x-teapot" in response.headers)


def test_a_registered_format_names_its_own_codes_and_schema_in_openapi():
    described = error_responses(InvalidRequest, error_format=TeapotFormat())

    assert described[400]["description"].startswith("`teapot_validation_error`")
    assert {BaseModel} == {response["model"] for response in described.values()}


def test_documented_errors_are_grouped_by_status():
    described = error_responses(InvalidRequest, PiiBlocked, RateLimited)

    assert {400, 429, "default"} == set(described)
    assert "`validation_error`" in described[400]["description"]
    assert "`pii_blocked`" in described[400]["description"]
