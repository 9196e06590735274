"""Which databases are understood, and what is said of them."""

import pytest

from app.access.database import Database
from app.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///data/service.db", "sqlite+aiosqlite:///data/service.db"),
        ("postgres://anna:secret@db/llm", "postgresql+asyncpg://anna:***@db/llm"),
        ("postgresql://db/llm?sslmode=require", "postgresql+asyncpg://db/llm?ssl=require"),
        ("postgresql+psycopg://db/llm", "postgresql+asyncpg://db/llm"),
    ],
)
def test_usual_urls_are_understood_and_shown_without_a_password(url: str, shown: str):
    assert shown == Database(url).name


@pytest.mark.parametrize("url", ["", "data/service.db", "mysql://db/llm", "sqlite://", "sqlite:///:memory:"])
def test_anything_else_stops_the_start_with_the_key(url: str):
    """A database in memory would lose every key with the process."""
    with pytest.raises(ConfigError, match=r"database\.url"):
        Database(url)
