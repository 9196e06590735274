"""Servers that stores are tried with."""

from tests.services.conftest import redis, redis_server

__all__ = ["redis", "redis_server"]
