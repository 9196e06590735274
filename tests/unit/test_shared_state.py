"""Several processes that share nothing are refused at the start, with the reason."""

from typing import Any

import pytest

from app.config import Settings, load_settings
from app.errors import ConfigError
from app.main import create_app, require_shared_state


def load(**sections: dict[str, Any]) -> Settings:
    return load_settings("absent.yml", None, **sections)


@pytest.mark.parametrize("several", [{"app": {"workers": 2}}, {"redis": {"replicas": 2}}], ids=["workers", "replicas"])
def test_without_redis_they_would_forget_conversations_or_grant_whole_limits(several: dict[str, Any]):
    """The application is not built; who has no sessions has to acknowledge the limits."""
    with pytest.raises(ConfigError, match=r"2 processes .* other conversations and grant the whole rate limits"):
        create_app(load(**several))
    with pytest.raises(ConfigError, match=r"would each grant the whole rate limits: set redis\.url, or"):
        create_app(load(**several, chat_history={"enabled": False}))
    with pytest.raises(ConfigError, match="other conversations"):
        create_app(load(**several, rate_limit={"per_process": True}))


@pytest.mark.parametrize(
    "shared",
    [
        {},
        {"app": {"workers": 2}, "redis": {"url": "redis://h", "replicas": 3}},
        {"app": {"workers": 2}, "chat_history": {"enabled": False}, "rate_limit": {"per_process": True}},
    ],
    ids=["one", "redis", "acknowledged"],
)
def test_what_behaves_as_one_or_is_acknowledged_may_start(shared: dict[str, Any]):
    require_shared_state(load(**shared))


def test_an_address_that_redis_does_not_have_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match=r"redis\.url: the URL begins with one of redis://") as refused:
        load(redis={"url": "http://canary:canary@h"})
    assert "canary" not in str(refused.value)
