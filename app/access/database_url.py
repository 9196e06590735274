"""Reads the URL of the database, and says where the database is without anything secret of the URL.

No message quotes the URL: whatever it holds may be a part of a password that was not written as a URL needs it.
"""

from typing import Any

from sqlalchemy import make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError

from app.errors import ConfigError

_KEY = "configuration: database.url:"
_TLS_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_HIDDEN = "***"
MAX_PORT = 65535
_PARAMETERS = ("host", "password", "port", "ssl", "sslmode", "user")


def parse_database_url(url: str) -> URL:
    """Return the URL with the driver that serves it.

    Raises: ConfigError: it is neither SQLite's nor Postgres', or not clear.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    except ValueError:  # of a port, which may be the rest of a password
        raise ConfigError(f"{_KEY} the port is no number; {_ESCAPING}") from None
    backend = parsed.get_backend_name() if parsed else ""
    if parsed is None or backend not in ("sqlite", "postgresql", "postgres"):
        raise ConfigError(f"{_KEY} must begin with postgresql:// or sqlite:///")
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigError(f"{_KEY} name a file, as in sqlite:///data/service.db")
        if parsed.query or parsed.username or parsed.password or parsed.host:
            raise ConfigError(f"{_KEY} SQLite takes a file and nothing else, as in sqlite:///data/service.db")
        return parsed.set(drivername="sqlite+aiosqlite")
    if url.count("@") > 1 or "@" in f"{parsed.host}{parsed.database}":
        raise ConfigError(f"{_KEY} it is not clear where the password ends; {_ESCAPING}")
    clear = parsed.set(drivername="postgresql+asyncpg", query=_query(parsed))
    _check_address(clear)
    return clear


def _check_address(url: URL) -> None:
    """Refuse what would end in a traceback: hosts and ports that do not fit together, or that no socket takes."""
    try:
        _, options = url.get_dialect()().create_connect_args(url)
    except (ArgumentError, ValueError):  # quotes what it refuses
        raise ConfigError(f"{_KEY} several hosts need a port each, as in ?host=a:5432&host=b:5432") from None
    hosts, ports = (_each(options.get(name)) for name in ("host", "port"))
    if not all(port is None or 0 < port <= MAX_PORT for port in ports):
        raise ConfigError(f"{_KEY} the port is no number from 1 to {MAX_PORT}; {_ESCAPING}")
    try:
        for host in hosts:
            (host or "").encode("idna")
    except UnicodeError:
        raise ConfigError(f"{_KEY} the host is no name and no address; {_ESCAPING}") from None


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


_ESCAPING = "write @ : / ? # and % in a user name, password or parameter as %40 %3A %2F %3F %23 %25"


def _query(parsed: URL) -> dict[str, str | tuple[str, ...]]:
    query = dict(parsed.query)
    if query.keys() - set(_PARAMETERS):
        raise ConfigError(f"{_KEY} has a parameter that is not known; known are {', '.join(_PARAMETERS)}")
    if "sslmode" in query:  # libpq's word, as hosts hand it out; asyncpg calls it ssl
        query["ssl"] = query.pop("sslmode")
    if "ssl" in query and query["ssl"] not in _TLS_MODES:
        raise ConfigError(f"{_KEY} sslmode must be one of {', '.join(_TLS_MODES)}")
    return query


def shown(url: URL) -> str:
    """Return where the database is: the URL without its password, a user that stands alone, and parameters but TLS."""
    if url.get_backend_name() == "sqlite":
        return url.render_as_string()
    user = "" if not url.username else f"{url.username}:{_HIDDEN}@" if url.password else f"{_HIDDEN}@"
    host = f"[{url.host}]" if ":" in (url.host or "") else url.host or ""
    port = f":{url.port}" if url.port else ""
    mode = f"?ssl={url.query['ssl']}" if "ssl" in url.query else ""
    return f"{url.drivername}://{user}{host}{port}/{url.database or ''}{mode}"


def without_secrets(url: URL, text: str) -> str:
    """Return a message of the server or the driver without what `shown` leaves out of the URL."""
    secrets = [str(value) for name, value in url.query.items() if name in ("user", "password")]
    secrets += [url.password or "", "" if url.password else url.username or ""]
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return text
