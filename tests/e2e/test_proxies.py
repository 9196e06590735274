"""Whose address counts, behind a reverse proxy and without one, over real sockets."""

import httpx
import pytest

from tests.e2e.conftest import Service, Start

pytestmark = pytest.mark.e2e

SETTINGS = {"MODEL__ENGINE": "echo", "SECURITY__FAILED_KEYS_PER_MINUTE": "2"}


def guess(service: Service, forwarded_for: str) -> int:
    """Send a wrong key with this X-Forwarded-For and return the status."""
    headers = {"X-API-Key": "wrong-key-0123456789", "X-Forwarded-For": forwarded_for}
    return httpx.get(f"{service.url}/v1/models", headers=headers).status_code


def test_a_client_cannot_claim_an_address(start: Start) -> None:
    """Without a trusted proxy the header is ignored: each guess counts against the connection's own address."""
    service = start(**SETTINGS)

    assert [401, 401, 429] == [guess(service, f"203.0.113.{number}") for number in range(3)]


def test_behind_a_trusted_proxy_the_last_address_counts_that_is_none(start: Start) -> None:
    """What the client itself wrote stands before it, and changes nothing."""
    service = start(**SETTINGS, APP__TRUSTED_PROXIES='["127.0.0.1"]')

    chains = [f"198.51.100.{number}, 203.0.113.7" for number in range(3)]
    assert [401, 401, 429] == [guess(service, chain) for chain in chains]
    assert 401 == guess(service, "203.0.113.8")
    assert 429 == guess(service, "203.0.113.8, 203.0.113.7, 127.0.0.1")
