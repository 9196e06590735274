"""What all tests share: a machine with busy cores is no reason to fail a property."""

from hypothesis import HealthCheck, settings

settings.register_profile("service", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("service")
