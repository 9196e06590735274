"""Examines an installation and says in one line each what is well, what is not, and what to do about it.

Reads and measures.  Changes nothing but a probe file that it removes and a key in Redis that expires, and writes to the
database what that holds already.  Works beside a running service and where nothing runs.  No finding quotes a secret, a
command line or an environment variable's value.
"""

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from app.config import Settings
from app.doctor.database import examine_database
from app.doctor.findings import Finding, Level, problem, warning
from app.doctor.machine import examine_machine
from app.doctor.model import examine_model
from app.doctor.network import examine_network
from app.doctor.redis import examine_redis
from app.doctor.settings import examine_configuration
from app.doctor.storage import examine_storage

__all__ = ["Finding", "Level", "examine"]


async def examine(config: Path) -> list[Finding]:
    """Return all findings; those that need the configuration are missing where it cannot be read."""
    settings, findings = examine_configuration(config)
    if settings is None:
        text = "data folder, database, model and port are not examined: the configuration names them"
        findings.append(warning("configuration", text, "correct it and examine again"))
    else:
        findings += _safely("network", examine_network, settings)
        findings += _safely("storage", examine_storage, settings)
        findings += await _safely_async("database", examine_database, settings)
        findings += await _safely_async("redis", examine_redis, settings)
        findings += _safely("model", examine_model, settings)
    return [*findings, *examine_machine()]


def _safely(subject: str, work: Callable[[Settings], Iterable[Finding]], settings: Settings) -> list[Finding]:
    """Return the findings up to one that cannot be made: the others are worth knowing all the more."""
    found: list[Finding] = []
    try:
        found += work(settings)
    except Exception as error:  # noqa: BLE001  # whatever it is; its message may quote a secret
        found.append(_unexamined(subject, error))
    return found


async def _safely_async(
    subject: str, work: Callable[[Settings], Awaitable[list[Finding]]], settings: Settings
) -> list[Finding]:
    try:
        return await work(settings)
    except Exception as error:  # noqa: BLE001  # as above
        return [_unexamined(subject, error)]


def _unexamined(subject: str, error: Exception) -> Finding:
    return problem(subject, f"it cannot be examined ({type(error).__name__})", "look at what the start says")
