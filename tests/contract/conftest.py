"""Lends the contract suites the server that the tests of services have."""

from tests.services.conftest import redis, redis_connections, redis_server

__all__ = ["redis", "redis_connections", "redis_server"]
