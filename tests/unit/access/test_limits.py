"""Which limit holds for a key."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import typer

from app.access import tables
from app.access.limits import LIMIT_NAMES, LIMIT_SPECS, LimitSettings, configured, resolve
from app.cli import keys, roles
from app.config import QuotaConfig, RateLimitConfig, Settings
from app.types import Limits
from app.web.admin.keys import LimitFields, LimitsResponse

DEFAULTS = Limits(monthly_tokens=1, requests_per_minute=10, burst=20, tokens_per_minute=3, parallel_requests=4)


def test_the_keys_own_word_wins_over_its_roles_and_that_over_the_configured():
    """None says nothing; 0 says that there is no limit."""
    key = LimitSettings(monthly_tokens=0)
    role = LimitSettings(monthly_tokens=50, parallel_requests=7)

    found = resolve(DEFAULTS, key, role)

    assert (0, 7, 3) == (found.monthly_tokens, found.parallel_requests, found.tokens_per_minute)


def test_a_lower_rate_brings_no_larger_burst_along():
    """Who sets a rate of one a minute does not mean twenty at once."""
    assert 1 == resolve(DEFAULTS, LimitSettings(requests_per_minute=1)).burst
    assert 5 == resolve(DEFAULTS, LimitSettings(requests_per_minute=1, burst=5)).burst
    assert 2 == resolve(DEFAULTS, LimitSettings(burst=2), LimitSettings(requests_per_minute=1)).burst


def test_without_any_word_the_configuration_holds():
    found = resolve(configured(RateLimitConfig(), QuotaConfig(monthly_tokens=9)))

    assert (9, 60, 60) == (found.monthly_tokens, found.requests_per_minute, found.burst)


def test_every_mention_of_the_limits_agrees_with_their_description(subtests):
    """Where a type checker wants the names written out: the same ones, in the same order."""
    mentions: dict[str, Iterable[str]] = {
        "Limits": [field.name for field in fields(Limits)],
        "LimitSettings": [field.name for field in fields(LimitSettings)],
        "the roles table": [column.name for column in tables.roles.c if column.name in LIMIT_NAMES],
        "the keys table": [column.name for column in tables.api_keys.c if column.name in LIMIT_NAMES],
        "bodies": LimitFields.model_fields,
        "replies": LimitsResponse.model_fields,
        "roles set": options(roles.cli, "set"),
        "keys create": options(keys.cli, "create"),
    }
    for where, names in mentions.items():
        with subtests.test(where):
            assert LIMIT_NAMES == tuple(names)
    for spec in LIMIT_SPECS:
        with subtests.test(spec.name):
            section: Any = Settings.model_fields[spec.section].annotation
            assert isinstance(section.model_fields[spec.setting].default, int)


def options(cli: typer.Typer, command: str) -> list[str]:
    """Return the limits that a command of the command line has an option for."""
    commands: Any = typer.main.get_command(cli)
    return [each.name for each in commands.commands[command].params if each.name in LIMIT_NAMES]
