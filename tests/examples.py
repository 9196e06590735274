"""How many examples a property is tried with: few in `make test`, all of them in `make test-long`."""

from typing import Any

from hypothesis import settings

QUICK, THOROUGH = "quick", "thorough"
"""Names of profiles; `make test-long` chooses the second by `--hypothesis-profile`."""
LESS = 5
"""How many times fewer examples are quick."""


def examples(count: int, **others: Any) -> settings:
    """Return settings for a property that is to be tried so often where there is time."""
    thorough = settings.get_current_profile_name() == THOROUGH
    return settings(max_examples=count if thorough else max(count // LESS, 5), deadline=None, **others)
