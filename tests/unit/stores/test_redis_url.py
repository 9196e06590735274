"""URLs of Redis: what each form says, and that no message repeats one."""

import pytest

from app.errors import ConfigError
from app.stores.redis_url import RedisUrl, parse_redis_url


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("redis://", RedisUrl("single", (("localhost", 6379),))),
        ("redis://h/3", RedisUrl("single", (("h", 6379),), database=3)),
        ("valkey://h?db=4", RedisUrl("single", (("h", 6379),), database=4)),
        ("rediss://:p%40ss@[::1]:7000", RedisUrl("single", (("::1", 7000),), password="p@ss", tls=True)),
        (
            "valkeys://u:p@h?ssl_ca_certs=/ca.pem",
            RedisUrl(
                "single",
                (("h", 6379),),
                username="u",
                password="p",
                tls=True,
                options=(("ssl_ca_certs", "/ca.pem"),),
            ),
        ),
        ("unix:///run/redis.sock?db=2", RedisUrl("single", path="/run/redis.sock", database=2)),
        (
            "redis+sentinel://a,b:26380/main/2",
            RedisUrl("sentinel", (("a", 26379), ("b", 26380)), service="main", database=2),
        ),
        ("rediss+cluster://a:7000,b", RedisUrl("cluster", (("a", 7000), ("b", 6379)), tls=True)),
    ],
)
def test_every_form_is_understood(url: str, meant: RedisUrl):
    assert meant == parse_redis_url(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://user:canary/word@h", "where the password ends"),
        ("redis://user:canary@word@h", "where the password ends"),
        ("redis://h:canary", "port"),
        ("redis://h:70000", "port"),
        ("redis://h/canary", "database is a number"),
        ("redis://h?socket_timeout=canary", "parameter that is not known"),
        ("redis://canary,b", "redis+sentinel:// or redis+cluster://"),
        ("redis+sentinel://canary", "name the server"),
        ("redis+cluster://canary/1", "database but 0"),
        ("redis://[canary", "no URL"),
    ],
)
def test_what_is_not_clear_is_refused_and_not_repeated(url: str, reason: str):
    with pytest.raises(ConfigError, match=reason.replace("+", r"\+")) as refused:
        parse_redis_url(url)

    assert "canary" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("redis://canary:canary@h:1/0", "Redis at h:1"),
        ("redis://[::1]", "Redis at [::1]:6379"),
        ("unix:///run/redis.sock", "Redis at /run/redis.sock"),
        ("redis+sentinel://:canary@a,b/main", "Redis main, known to the Sentinels a:26379, b:26379"),
        ("redis+cluster://canary:canary@a", "the Redis cluster of a:6379"),
    ],
)
def test_where_it_is_can_be_said_without_secrets(url: str, where: str):
    parsed = parse_redis_url(url)

    assert where == parsed.where
    assert "canary" not in repr(parsed).replace("username='canary'", "")
