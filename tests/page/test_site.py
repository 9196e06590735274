"""The site of the documentation, in a browser: its search finds pages, and nothing comes from another host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.async_api import async_playwright, expect

from tests.page.chat_page import CHROMIUM, OPTIONS
from tests.ports import free_port
from tests.unit.scripts.test_site_pages import build

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(CHROMIUM is None and "REQUIRE_SERVICES" not in os.environ, reason="there is no Chromium")
async def test_the_search_finds_a_page_without_another_host(tmp_path: Path):
    assert 0 == build(ROOT, tmp_path).returncode
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: ASYNC220
    requested: list[str] = []
    try:
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
            page = await browser.new_page()
            page.on("request", lambda request: requested.append(request.url))
            await page.goto(f"http://127.0.0.1:{port}/index.html")
            query = page.locator("[data-md-component=search-query]")
            await query.click()
            await query.press_sequentially("monthly quota")
            found = page.locator(".md-search-result__link", has_text="Keys, roles, limits and quotas")
            await expect(found.first).to_be_visible(timeout=60_000)
            await browser.close()
    finally:
        server.terminate()
        server.wait(10)

    assert requested
    assert set() == {url for url in requested if not url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))}
