"""What clients see while the worker, Redis and Postgres are killed and suspended under load."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.services.fault_report import details, problems, summary
from tests.services.faults import FAULTS, KINDS, play, staged
from tests.services.postgres import Postgres
from tests.services.redis_server import RedisServer

SHORT = ("Redis suspended, continued", "Postgres killed, started again")
STREAM, _, WITH_QUOTA, SESSION, _ = KINDS
CONCERNED = {
    "worker killed": STREAM,
    "worker suspended for good": STREAM,
    "Redis killed, started again": SESSION,
    "Redis suspended, continued": SESSION,
    "Postgres killed, started again": WITH_QUOTA,
}
"""Requests of which some are certainly refused; what is suspended for a moment may cost time alone."""


@pytest.mark.services
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "names", [pytest.param(SHORT, id="short"), pytest.param(tuple(FAULTS), id="all", marks=pytest.mark.soak)]
)
async def test_faults_under_load_are_answered_with_codes_and_every_request_is_served_again(
    names: Sequence[str], redis: RedisServer, postgres: Postgres, postgres_url: str, tmp_path: Path
) -> None:
    """None hangs, no stream is cut and no 5xx is without a code; what a fault concerns is refused while it lasts."""
    async with staged(redis, postgres, postgres_url, tmp_path) as stage:
        found = {name: [await play(stage, FAULTS[name], 1.5, 1)] for name in names}

    assert [] == problems(found), details(found)
    assert "never" not in summary(found), details(found)
    for name, kind in CONCERNED.items():
        said = {each.said for one in found.get(name, ()) for each in one.outcomes if each.kind == kind}
        assert name not in found or any("service_unavailable" in each for each in said), (name, details(found))
