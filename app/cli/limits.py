"""The options of the commands that set limits, one for each entry of `LIMIT_SPECS`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from app.access.limits import LIMIT_SPECS, LimitSpec

DEFAULT = "default"
"""Takes a limit back: what the configuration says holds again."""
MAX_DIGITS = 15


def with_limit_options(*, after: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `**limits` an option for each limit.

    Args: after: the parameter behind which the help lists them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        # typer reads a command's options from its signature, which can only be written out or, as here, assigned.
        signature = inspect.signature(command)
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [
            each.replace(kind=keyword)
            for each in signature.parameters.values()
            if each.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        place = [each.name for each in own].index(after) + 1
        options = [
            inspect.Parameter(spec.name, keyword, default=None, annotation=_option(spec)) for spec in LIMIT_SPECS
        ]
        vars(command)["__signature__"] = signature.replace(parameters=[*own[:place], *options, *own[place:]])
        return command

    return decorate


def limit_values(given: Mapping[str, str | None]) -> dict[str, int | None]:
    """Return the limits that were named; None takes one back."""
    return {name: None if value == DEFAULT else int(value) for name, value in given.items() if value is not None}


def _option(spec: LimitSpec) -> Any:
    text = f"{spec.help}; 0 is no limit, {DEFAULT} what the configuration says."
    return Annotated[str | None, typer.Option(metavar=f"<{spec.unit}>", help=text, callback=_check)]


def _check(value: str | None) -> str | None:
    if value is None or value == DEFAULT or (value.isdecimal() and len(value) <= MAX_DIGITS):
        return value
    raise typer.BadParameter(f"must be a whole number (0 is no limit) or {DEFAULT}")
