"""Reads the URL of Redis, and makes the client of the kind of installation that it names.

No message quotes the URL: whatever it holds may be a part of a password that was not written as a URL needs it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import Redis, Sentinel
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.config.redis import RedisConfig
from app.errors import ConfigError

Client: TypeAlias = "Redis | RedisCluster"

_KEY = "configuration: redis.url:"
_ESCAPING = "write @ : / ? # and % in a user name or password as %40 %3A %2F %3F %23 %25"
_OPTIONS = ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile", "ssl_min_version")
_PORT, _SENTINEL_PORT = 6379, 26379
MAX_PORT = 65535

Kind = Literal["single", "sentinel", "cluster"]


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """What a URL says."""

    kind: Kind
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    """Of a socket, which has no hosts."""
    database: int = 0
    service: str = ""
    """The name under which the Sentinels know the server."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    options: tuple[tuple[str, str], ...] = ()

    @property
    def where(self) -> str:
        """Where it is, without user, password and options."""
        hosts = ", ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        if self.kind == "sentinel":
            return f"Redis {self.service}, known to the Sentinels {hosts}"
        return f"the Redis cluster of {hosts}" if self.kind == "cluster" else f"Redis at {self.path or hosts}"


def parse_redis_url(url: str) -> RedisUrl:
    """Take a URL apart.  Raises: ConfigError: it is none of the forms that docs/scaling.md lists."""
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query), keep_blank_values=True))
    except ValueError:
        raise ConfigError(f"{_KEY} it is no URL; {_ESCAPING}") from None
    scheme, _, installation = parts.scheme.replace("valkeys", "rediss").replace("valkey", "redis").partition("+")
    userinfo, _, hosts = parts.netloc.rpartition("@")
    if "@" in userinfo or parts.fragment or "@" in parts.path:
        raise ConfigError(f"{_KEY} it is not clear where the password ends; {_ESCAPING}")
    username, _, password = userinfo.partition(":")
    credentials = {"username": unquote(username) or None, "password": unquote(password) or None}
    database = query.pop("db", None)
    if query.keys() - set(_OPTIONS):
        raise ConfigError(f"{_KEY} has a parameter that is not known; known are db, {', '.join(_OPTIONS)}")
    shared: dict[str, Any] = {**credentials, "tls": scheme == "rediss", "options": tuple(query.items())}
    if scheme == "unix":
        return RedisUrl("single", path=unquote(parts.path), database=_database(database or "0"), **shared)
    if installation == "sentinel":
        service, _, name = parts.path.strip("/").partition("/")
        if not service:
            raise ConfigError(f"{_KEY} name the server after the Sentinels: redis+sentinel://host,host/name")
        addresses = _hosts(hosts, _SENTINEL_PORT)
        return RedisUrl("sentinel", addresses, service=service, database=_database(database or name), **shared)
    number = _database(database or parts.path.strip("/"))
    if installation == "cluster":
        if number:
            raise ConfigError(f"{_KEY} a cluster has no database but 0")
        return RedisUrl("cluster", _hosts(hosts, _PORT), **shared)
    addresses = _hosts(hosts, _PORT)
    if len(addresses) > 1:
        raise ConfigError(f"{_KEY} several hosts are written redis+sentinel:// or redis+cluster://")
    return RedisUrl("single", addresses, database=number, **shared)


def _database(text: str) -> int:
    if text and not text.isdecimal():
        raise ConfigError(f"{_KEY} the database is a number, as in redis://host:6379/0")
    return int(text or "0")


def _hosts(text: str, default_port: int) -> tuple[tuple[str, int], ...]:
    return tuple(_address(each.strip(), default_port) for each in text.split(","))


def _address(text: str, default_port: int) -> tuple[str, int]:
    """Return host and port of `host`, `host:port` or `[address]:port`."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(default_port)
    if not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
        raise ConfigError(f"{_KEY} the port is no number from 1 to {MAX_PORT}; {_ESCAPING}")
    return host.removeprefix("[").removesuffix("]") or "localhost", int(port)


def make_client(url: RedisUrl, config: RedisConfig, *, max_connections: int) -> Client:
    """Return a client that has no connection yet.  It never tries a command twice: not all may be done twice."""
    password = config.password.get_secret_value() if config.password else url.password
    options: dict[str, Any] = {
        "username": url.username,
        "password": password,
        "socket_timeout": config.timeout_seconds,
        "socket_connect_timeout": config.timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
        # Each further command of a new connection is a further wait for a server that is far away.
        "driver_info": None,
        "protocol": 2,
        "max_connections": max_connections,
    }
    if url.tls:
        options |= {"ssl": True, **dict(url.options)}
    if url.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in url.hosts]
        return RedisCluster(startup_nodes=nodes, **options)
    options["db"] = url.database
    if url.kind == "sentinel":
        secret = config.sentinel_password
        own = {name: value for name, value in options.items() if name not in ("username", "password", "db")}
        own |= {"password": secret.get_secret_value()} if secret else {}
        sentinels = Sentinel(url.hosts, sentinel_kwargs=own, **options)  # type: ignore[no-untyped-call]
        client: Redis = sentinels.master_for(url.service)
        return client
    if url.path:
        return Redis(unix_socket_path=url.path, **options)
    host, port = url.hosts[0]
    return Redis(host=host, port=port, **options)
