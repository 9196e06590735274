"""POST /page/key: the code of a one-time link against the first key."""

import time
from pathlib import Path

import httpx

from app.access.page_link import new_code
from tests.web.access import Running, running


async def send(service: Running, code: str) -> httpx.Response:
    """Send a code as a browser does, without a key."""
    async with service.client() as http:
        del http.headers["X-API-Key"]
        return await http.post("/page/key", json={"code": code})


async def test_a_code_is_exchanged_once_for_the_key_that_the_service_made(tmp_path: Path):
    async with running(tmp_path, security={"api_key": None}) as service:
        code = new_code(tmp_path, time.time())
        first, second = await send(service, code), await send(service, code)
        async with service.client(first.json()["key"]) as http:
            models = await http.get("/v1/models")

    assert [200, 401, 200] == [first.status_code, second.status_code, models.status_code]
    assert (tmp_path / "api_key").read_text().strip() == first.json()["key"]
    assert "no-store" == first.headers["cache-control"]


async def test_wrong_codes_count_as_wrong_keys(tmp_path: Path):
    """The same address is slowed down, whichever of the two it guesses; the right code still works."""
    async with running(tmp_path, security={"api_key": None, "failed_keys_per_minute": 2}) as service:
        code = new_code(tmp_path, time.time())
        codes = [(await send(service, "once_wrong")).status_code for _ in range(3)]
        async with service.client("llm_wrong") as http:
            keys = (await http.get("/v1/models")).status_code
        right = await send(service, code)

    assert [401, 401, 429] == codes
    assert 429 == keys
    assert 200 == right.status_code


async def test_a_key_that_was_configured_is_handed_to_nobody(tmp_path: Path):
    async with running(tmp_path) as service:
        refused = await send(service, new_code(tmp_path, time.time()))

    assert 401 == refused.status_code


async def test_without_the_page_there_is_no_such_route(tmp_path: Path):
    async with running(tmp_path, security={"api_key": None, "page": False}) as service:
        refused = await send(service, new_code(tmp_path, time.time()))

    assert 401 == refused.status_code
    assert "X-API-Key" in refused.json()["message"]
