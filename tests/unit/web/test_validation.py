"""A body with very many mistakes is refused at once: it is validated once, and its mistakes are not all described."""

from typing import Any, ClassVar

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict

from app.web.http.validation import MAX_LISTED, MAX_REPAIRS, validated


class Body(BaseModel):
    """Counts how often it is validated."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rounds: ClassVar[int] = 0
    number: int = 0

    @classmethod
    def model_validate(cls, *args: Any, **options: Any) -> Any:
        Body.rounds += 1
        return super().model_validate(*args, **options)


@pytest.fixture(autouse=True)
def rounds() -> None:
    Body.rounds = 0


def unknown(count: int) -> dict[str, Any]:
    return {f"field{number}": 1 for number in range(count)}


def refusal(body: dict[str, Any], ignored: list[str] | None) -> list[Any]:
    with pytest.raises(RequestValidationError) as refused:
        validated(Body, body, ignored=ignored)
    return list(refused.value.errors())


def test_as_many_mistakes_as_clients_make_are_repaired() -> None:
    ignored: list[str] = []

    body = validated(Body, {"number": 20.0, **unknown(MAX_REPAIRS - 1)}, ignored=ignored)

    assert (20, MAX_REPAIRS - 1, 2) == (body.number, len(ignored), Body.rounds)


@pytest.mark.parametrize("ignored", [None, []])
def test_more_are_refused_in_the_first_round_with_the_first_of_them(ignored: list[str] | None) -> None:
    body = {"number": 20.0, **unknown(MAX_REPAIRS)}

    found = refusal(body, ignored)

    assert (1, MAX_REPAIRS) == (Body.rounds, len(found))
    assert [("body", "number"), ("body", "field0")] == [each["loc"] for each in found[:2]]
    assert not ignored
    assert 20.0 == body["number"]
    assert isinstance(body["number"], float)


def test_far_too_many_are_only_counted() -> None:
    """pydantic describes all mistakes or none, and so many would hold the event loop."""
    (only,) = refusal(unknown(MAX_LISTED + 1), [])

    assert (1, ("body",)) == (Body.rounds, only["loc"])
    assert f"holds {MAX_LISTED + 1} mistakes, too many to name them" == only["msg"]
