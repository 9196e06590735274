"""A service with an engine that says what a test tells it, and its chat page in Chromium."""

import asyncio
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from msgspec import structs
from playwright.async_api import Browser, Locator, Page, async_playwright, expect

from app.engine.adapter_source import AdapterFiles
from app.engine.base import Capabilities, EngineInfo
from app.engine.echo import EchoEngine
from app.errors import AppError
from app.events import Delta, Event, Started, finish
from app.ipc.messages import AdapterLoaded
from app.requests import GenerationRequest
from app.types import FinishReason, Usage
from tests.web.access import ADMIN_KEY, Running, running
from tests.web.harness import ScriptedService, Web

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
PHONE = {"width": 390, "height": 780}
# As long as a busy machine may need.
expect.set_options(timeout=20_000)


class ScriptedEngine(EchoEngine):
    """Says what it is told, step by step, and echoes where it is told nothing."""

    def __init__(self) -> None:
        super().__init__(model="echo")
        self.says: Sequence[str | AppError | asyncio.Event] = ()
        """A text to send, an error to end with, or an event to wait for."""
        self.prompts: list[str] = []
        self.requests: list[GenerationRequest] = []
        self.adapters: list[str | None] = []
        """That of each request; any can be loaded, and changes nothing."""

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, capabilities=Capabilities(unsupported=("grammar",), adapters=True))

    async def load_adapter(self, files: AdapterFiles, max_rank: int) -> AdapterLoaded:
        return AdapterLoaded(1, files.folder, 4, 1000, "someone/base")

    def unload_adapter(self, digest: str) -> None:
        return

    def adapters_in_use(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), ()

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.adapters.append(request.adapter)
        request = structs.replace(request, adapter=None)
        self.prompts.append(self.tokenizer.decode(request.prompt_ids or ()))
        if self.says and isinstance(self.says[0], AppError):
            raise self.says[0]
        if not self.says:
            async with aclosing(super().stream(request)) as events:
                async for event in events:
                    yield event
            return
        yield Started(prompt_tokens=request.prompt_tokens)
        for step in self.says:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, AppError):
                raise step
            else:
                request.progress.generated += 1
                yield Delta(text=step, tokens=1)
        usage = Usage(prompt_tokens=request.prompt_tokens, completion_tokens=request.progress.generated)
        yield finish(FinishReason.STOP, usage, None)


@dataclass
class Visit:
    """A visit of the page, in a context of its own."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    """What the console complains of, and scripts that failed."""

    @property
    def draft(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.get_by_label("Assistant", exact=True)

    @property
    def questions(self) -> Locator:
        return self.page.get_by_label("You", exact=True)

    @property
    def sessions(self) -> Locator:
        return self.page.locator("#sessions a")

    async def open(self, key: str = ADMIN_KEY) -> None:
        """Open the page in a tab that has the key."""
        await self.page.goto(f"{self.url}/page/icon.svg")
        await self.page.evaluate("key => sessionStorage.setItem('llm-service-key', key)", key)
        await self.page.goto(self.url)
        await expect(self.draft).to_be_visible()

    async def send(self, text: str) -> None:
        """Send a message without waiting for its answer."""
        await self.draft.fill(text)
        await self.draft.press("Enter")

    async def chat(self, text: str) -> None:
        """Send a message, and wait for the end of its answer."""
        count = await self.answers.count()
        await self.send(text)
        await expect(self.answers).to_have_count(count + 1)
        await self.ended()

    async def ended(self) -> None:
        await expect(self.page.get_by_role("button", name="Send", exact=True)).to_be_visible()


@dataclass
class Site:
    """A service that listens, and a browser to visit it with."""

    running: Running
    engine: ScriptedEngine
    url: str
    browser: Browser

    @asynccontextmanager
    async def visit(self, **options: Any) -> AsyncIterator[Visit]:
        """Args: options: of the browser's context, such as `viewport`."""
        context = await self.browser.new_context(**options)
        page = await context.new_page()
        visit = Visit(page, self.url)
        page.on("pageerror", lambda error: visit.problems.append(str(error)))
        # A refusal of the service is a line of the console, too; what the page makes of it the tests see.
        refusal = "Failed to load resource: the server responded"
        page.on(
            "console",
            lambda line: (
                visit.problems.append(line.text) if line.type == "error" and not line.text.startswith(refusal) else None
            ),
        )
        page.set_default_timeout(20_000)
        try:
            yield visit
        finally:
            await context.close()
            self.engine.says = ()

    async def stored(self, key: str = ADMIN_KEY) -> list[dict[str, Any]]:
        """Return the sessions that the service lists."""
        async with httpx.AsyncClient(base_url=self.url, headers={"X-API-Key": key}) as http:
            sessions: list[dict[str, Any]] = (await http.get("/v1/sessions")).json()["sessions"]
        return sessions

    async def key(self, **fields: Any) -> str:
        """Create a key, whose sessions are its own."""
        return await self.running.key(**fields)


@asynccontextmanager
async def served(folder: Path, **sections: Any) -> AsyncIterator[Site]:
    """Serve the page, and start a browser."""
    engine = ScriptedEngine()
    sections = {"cache": {"enabled": False}, **sections}
    async with (
        running(folder, engine=engine, **sections) as service,
        Web(service.app, ScriptedService()).listening() as port,
        async_playwright() as playwright,
    ):
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        try:
            yield Site(service, engine, f"http://127.0.0.1:{port}", browser)
        finally:
            await browser.close()
