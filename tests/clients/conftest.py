"""A service with the embedded model for real clients."""

from tests.e2e.conftest import compiled, service, start

__all__ = ["compiled", "service", "start"]
