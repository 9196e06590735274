"""/docs and /redoc: where they are served, and that a browser renders them without a request to any other host."""

import asyncio
import json
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from app.web.admin import documentation
from tests.waiting import START_SECONDS
from tests.web.harness import Web, make_web

PAGES = ("/docs", "/redoc")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.parametrize(
    ("host", "configured", "served"),
    [
        ("127.0.0.1", None, True),
        ("127.8.8.8", None, True),
        ("::1", None, True),
        ("localhost", None, True),
        ("0.0.0.0", None, False),  # noqa: S104
        ("::", None, False),
        ("192.168.0.7", None, False),
        ("example.com", None, False),
        ("0.0.0.0", True, True),  # noqa: S104
        ("127.0.0.1", False, False),
    ],
)
async def test_the_pages_are_served_on_loopback_unless_the_settings_say_otherwise(host, configured, served):
    """Without a key; where they are not, a stranger learns nothing and a caller gets 404."""
    web = await make_web(app={"host": host}, security={"docs": configured})
    paths = sorted(documentation.PUBLIC_PATHS)
    async with web.client(nothing="") as stranger, web.client() as caller:
        strangers = {(await stranger.get(path)).status_code for path in paths}
        callers = {(await caller.get(path)).status_code for path in paths}
        links = (await stranger.get("/")).json()["links"]

    assert ({200}, {200}) if served else ({401}, {404}) == (strangers, callers)
    assert served is ("docs" in links)


async def test_the_pages_allow_no_inline_script_and_no_other_host(client):
    for page in PAGES:
        reply = await client.get(page)
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))

        assert ("'none'", "'self'", "'none'") == (
            policy["default-src"],
            policy["script-src"],
            policy["frame-ancestors"],
        )
        assert not re.search(r"unsafe|https?:|[*]", str(policy))
        assert [] == re.findall(r"<script(?! src=)|<style|\\son\\w+=|javascript:", reply.text)
        assert [] == re.findall(r'(?:src|href)="(?!docs/|redoc/)', reply.text)


def test_the_one_foreign_address_that_redoc_loads_is_the_one_that_is_replaced():
    """A new version that loads another one fails here and in the browser."""
    script = files("fastapi_offline").joinpath("static", "redoc.standalone.js").read_bytes()

    assert 1 == script.count(documentation.REDOC_LOGO)
    assert {documentation.REDOC_LOGO} == set(re.findall(rb'src:"(https?://[^"]+)"', script))


async def test_the_title_of_the_service_is_text_and_no_markup():
    web = await make_web(app={"name": "<script>alert(1)</script>"})
    async with web.client() as client:
        assert "<script>alert" not in (await client.get("/docs")).text


async def render(web: Web, path: str, folder: Path) -> tuple[str, list[str], set[str]]:
    """Open a page in Chromium; return its document, what its console says, and the addresses that it requests."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    async with web.listening() as port:
        browser = await asyncio.create_subprocess_exec(
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            # The browser's own requests do not leave this machine either.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *(f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr"),
            *("--virtual-time-budget=15000", "--dump-dom", f"http://127.0.0.1:{port}{path}"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                document, errors = await browser.communicate()
        finally:
            if browser.returncode is None:
                browser.kill()
        origin = f"http://127.0.0.1:{port}"
    said = [line for line in errors.decode().splitlines() if "CONSOLE" in line]
    events: list[dict[str, Any]] = json.loads(log.read_text())["events"]
    started = [event["params"] for event in events if "initiator" in event.get("params", {})]
    requested = {str(each["url"]) for each in started if each["initiator"] == origin or each["url"].startswith(origin)}
    return document.decode(), said, {url.removeprefix(origin) for url in requested}


@pytest.mark.skipif(CHROMIUM is None and "REQUIRE_SERVICES" not in os.environ, reason="there is no Chromium")
@pytest.mark.parametrize("page", PAGES)
async def test_a_browser_renders_the_page_with_every_operation_and_blocks_nothing(tmp_path, page):
    """No message in the console, which is where a blocked script, style or request would be named."""
    web = await make_web()

    document, said, requested = await render(web, page, tmp_path)

    paths = web.app.openapi()["paths"]
    text = re.sub("<[^>]*>|\u200b", "", document)
    assert [] == [path for path in paths if path not in text]
    assert [] == said
    assert page in requested
    assert "/openapi.json" in requested
    assert requested <= documentation.PUBLIC_PATHS
