"""What clients see while the worker, Redis and Postgres are killed and suspended under load."""

from pathlib import Path

import pytest

from tests.services.fault_report import details, problems, summary
from tests.services.faults import FAULTS, KINDS, play, staged
from tests.services.postgres import Postgres
from tests.services.redis_server import RedisServer

SHORT = ("worker killed", "Redis suspended, continued", "Postgres killed, started again")


@pytest.mark.services
@pytest.mark.timeout(600)
async def test_faults_under_load_are_answered_with_codes_and_every_request_is_served_again(
    redis: RedisServer, postgres: Postgres, postgres_url: str, tmp_path: Path
) -> None:
    """None hangs, no stream is cut and no 5xx is without a code; what a fault concerns is refused while it lasts."""
    async with staged(redis, postgres, postgres_url, tmp_path) as stage:
        found = {name: [await play(stage, FAULTS[name], 1.5, 1)] for name in SHORT}

    assert [] == problems(found), details(found)
    assert "never" not in summary(found)
    stream, _, with_quota, session, _ = KINDS
    concerned = dict(zip(SHORT, (stream, session, with_quota), strict=True))
    for name, kind in concerned.items():
        said = {each.said.split(" ", 1)[-1] for each in found[name][0].outcomes if each.kind == kind}
        assert "service_unavailable" in said, (name, details(found))
