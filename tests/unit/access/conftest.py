"""What the tests of this layer share."""

from collections.abc import AsyncIterator

import pytest

from app.access.background import BackgroundGroup


@pytest.fixture
async def background() -> AsyncIterator[BackgroundGroup]:
    """The background tasks of one replica."""
    group = BackgroundGroup()
    await group.start()
    yield group
    await group.close()
