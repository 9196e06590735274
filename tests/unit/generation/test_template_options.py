"""Variables of the chat template and the reasoning effort: honoured where the template reads them, else refused."""

from dataclasses import replace
from typing import Any

import pytest

from app.engine.base import EngineInfo
from app.errors import InvalidRequest
from app.generation.template_options import resolve_template_options
from app.requests import GenerationRequest
from tests.unit.generation.services import chat

INFO = EngineInfo(model="m", engine="echo", context_length=100)


def resolved(reads: tuple[str, ...], *, effort: str | None = None, **variables: Any) -> dict[str, Any]:
    request: GenerationRequest = chat("hi", reasoning_effort=effort, template_kwargs=tuple(sorted(variables.items())))
    info = replace(INFO, template_variables=reads)
    return dict(resolve_template_options(request, info).template_kwargs)


def test_what_the_template_reads_is_set():
    assert {"enable_thinking": False, "style": "brief"} == resolved(
        ("enable_thinking", "style"), enable_thinking=False, style="brief"
    )


@pytest.mark.parametrize("name", ["style", "messages", "tools", "chat_template", "bos_token"])
def test_another_variable_is_refused_and_the_known_ones_named(name):
    with pytest.raises(InvalidRequest, match="it reads enable_thinking") as refused:
        resolved(("enable_thinking",), **{name: "x"})

    assert f"chat_template_kwargs.{name}" == refused.value.details["errors"][0]["field"]


def test_a_name_that_could_be_anything_is_not_repeated():
    with pytest.raises(InvalidRequest) as refused:
        resolved((), card4111111111111111="x")

    assert "4111" not in refused.value.message


@pytest.mark.parametrize(
    ("reads", "effort", "expected"),
    [
        (("reasoning_effort",), "high", {"reasoning_effort": "high"}),
        (("enable_thinking",), "high", {"enable_thinking": True}),
        (("enable_thinking",), "none", {"enable_thinking": False}),
        (("thinking",), "none", {"thinking": False}),
        (("enable_thinking", "reasoning_effort"), "low", {"reasoning_effort": "low"}),
        ((), "none", {}),
        ((), None, {}),
    ],
)
def test_an_effort_becomes_what_the_template_has_for_it(reads, effort, expected):
    assert expected == resolved(reads, effort=effort)


def test_an_effort_that_the_template_does_not_know_is_refused():
    with pytest.raises(InvalidRequest, match="reasoning_effort is not supported"):
        resolved((), effort="low")


def test_a_variable_of_the_request_precedes_its_effort():
    assert {"enable_thinking": False} == resolved(("enable_thinking",), effort="high", enable_thinking=False)


def test_to_want_no_reasoning_of_a_template_without_any_changes_nothing():
    """Clients say so to every model alike."""
    assert {} == resolved((), enable_thinking=False, thinking=False, reasoning_effort="none")
    with pytest.raises(InvalidRequest):
        resolved((), enable_thinking=True)


def test_a_request_without_any_stays_the_same():
    request = chat("hi")
    assert request is resolve_template_options(request, INFO)
