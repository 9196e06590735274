"""A page of another origin calls the service from Chromium: what CORS allows is what a browser takes it to allow.

The page reports by a request to its own origin, so that nothing has to be read out of the browser.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.waiting import START_SECONDS
from tests.web.harness import KEY, RecordingEngine, make_web

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
NPM = shutil.which("npm")
NPM_PACKAGES = ("openai@7.59.0", "esbuild@0.28.2")
FETCH = """
const headers = {"authorization": "Bearer KEY", "content-type": "application/json", "x-request-id": "page-1",
                 "x-stainless-lang": "js", "x-stainless-retry-count": "0", "traceparent": "00-1-1-00"};
const send = (path, body) => fetch("SERVICE" + path, {method: "POST", headers, body: JSON.stringify(body)});
const ask = {messages: [{role: "user", content: "hello page"}], temperature: 0};
const found = {};
try {
  let answer = await send("/v1/chat/completions", {...ask, seeds: 1});
  found.text = (await answer.json()).choices[0].message.content;
  found.headers = ["x-request-id", "x-ignored-fields", "x-ratelimit-remaining-requests", "x-cache"].map(
    name => answer.headers.get(name));
  answer = await send("/v1/chat/completions", {...ask, stream: true});
  found.frames = (await answer.text()).split("data: ").length - 1;
  answer = await send("/v1/moderations", {});
  found.refused = [answer.status, (await answer.json()).error.code];
} catch (error) { found.error = String(error); }
"""
CLIENT = """
import OpenAI from "openai";
const client = new OpenAI({baseURL: "SERVICE/v1", apiKey: "KEY", dangerouslyAllowBrowser: true, maxRetries: 0});
const ask = {model: "scripted", messages: [{role: "user", content: "hello page"}], temperature: 0};
const found = {};
try {
  const {data, request_id} = await client.chat.completions.create(ask).withResponse();
  found.text = data.choices[0].message.content;
  found.named = request_id;
  found.streamed = "";
  for await (const chunk of await client.chat.completions.create({...ask, stream: true}))
    found.streamed += chunk.choices[0]?.delta?.content ?? "";
  found.models = (await client.models.list()).data.map(model => model.id);
  await client.moderations.create({input: "x"}).catch(error => { found.refused = [error.status, error.code]; });
} catch (error) { found.error = String(error); }
"""
REPORT = """
await fetch("/report", {method: "POST", body: JSON.stringify(found)});
"""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "REQUIRE_SERVICES" not in os.environ, reason="there is no Chromium"
)


@dataclass
class Page:
    """A page at an origin of its own, which reports to it."""

    script: str = ""
    origin: str = ""
    report: "asyncio.Future[Any]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        async with await asyncio.start_server(self._answer, "127.0.0.1", 0) as server:
            # Another name than the service's address is another origin, whatever the ports.
            self.origin = f"http://localhost:{server.sockets[0].getsockname()[1]}"
            yield

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        body = b""
        if head.startswith(b"POST /report"):
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            self.report.set_result(json.loads(await reader.readexactly(length)))
        elif head.startswith(b"GET / "):
            body = f"<!doctype html><script type=module>{self.script}</script>".encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()


async def run_page(build: Callable[[str], str], folder: Path, *, listed: bool = True) -> Any:
    """Return what a page reports that calls a service of another origin.

    Args:
        build: returns the page's script, given the service's address.
        listed: whether the service lists the page's origin.
    """
    page = Page()
    async with page.served():
        origin = page.origin if listed else "https://chat.example"
        web = await make_web(
            engines={"scripted": RecordingEngine()},
            security={"cors_origins": [origin]},
            openai={"unknown_fields": "ignore"},
        )
        async with web.listening() as port:
            page.script = build(f"http://127.0.0.1:{port}")
            browser = await asyncio.create_subprocess_exec(
                *(str(CHROMIUM), *OPTIONS, f"--user-data-dir={folder / 'profile'}", page.origin),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                async with asyncio.timeout(START_SECONDS):
                    return await page.report
            finally:
                os.killpg(browser.pid, signal.SIGKILL)
                await browser.wait()


def filled(script: str, service: str) -> str:
    return script.replace("SERVICE", service).replace("KEY", KEY)


async def test_a_page_of_a_listed_origin_sends_and_reads_what_it_needs(tmp_path):
    """With headers of its own, whole and streamed; it reads the headers of programs, and errors."""
    found = await run_page(lambda service: filled(FETCH, service) + REPORT, tmp_path)

    assert {
        "text": "hello page",
        "headers": ["page-1", "seeds", found["headers"][2], "MISS"],
        "frames": found["frames"],
        "refused": [404, "not_found"],
    } == found
    assert int(found["headers"][2]) > 0
    assert found["frames"] > 3


async def test_a_page_of_another_origin_gets_nothing(tmp_path):
    found = await run_page(lambda service: filled(FETCH, service) + REPORT, tmp_path, listed=False)

    assert {"error": "TypeError: Failed to fetch"} == found


@pytest.mark.clients
@pytest.mark.timeout(300)
async def test_openais_npm_client_works_in_a_page(tmp_path):
    """Bundled as pages are; its packages come from the npm registry."""

    def bundle(service: str) -> str:
        source = tmp_path / "page.mjs"
        source.write_text(filled(CLIENT, service) + REPORT)
        subprocess.run(
            [str(NPM), "install", "--no-audit", "--no-fund", "--ignore-scripts=false", *NPM_PACKAGES],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        built = subprocess.run(
            [tmp_path / "node_modules/.bin/esbuild", source, "--bundle", "--format=esm", "--platform=browser"],
            check=True,
            capture_output=True,
            text=True,
        )
        return built.stdout.replace("</script", "<\\/script")

    found = await run_page(bundle, tmp_path)

    assert {
        "text": "hello page",
        "named": found["named"],
        "streamed": "hello page",
        "models": ["scripted"],
        "refused": [404, "not_found"],
    } == found
    UUID(found["named"])
