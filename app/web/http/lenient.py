"""Request schemas that let pass what changes nothing."""

from typing import Any, ClassVar

from pydantic import model_validator

from app.web.http.json_body import StrictModel


class LenientModel(StrictModel):
    """A schema in which an unknown field that is null or empty is left out, and so is any of `harmless`."""

    harmless: ClassVar[frozenset[str]] = frozenset()
    """Fields that ask for nothing: hints for caches, and what other services have added to a message of theirs."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.keys() <= cls.model_fields.keys():
            return value
        known = cls.model_fields.keys()
        return {
            name: each
            for name, each in value.items()
            if name in known or not (name in cls.harmless or each is None or each in ("", [], {}))
        }
