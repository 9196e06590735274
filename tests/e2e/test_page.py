"""The chat page in Chromium on a real service: the embedded model, and its process killed in an answer."""

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import async_playwright, expect

from tests.e2e.conftest import KEY, Service, Start
from tests.page.chat_page import CHROMIUM, OPTIONS, Visit

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.soak,
    pytest.mark.skipif(CHROMIUM is None and "REQUIRE_SERVICES" not in os.environ, reason="there is no Chromium"),
]


@asynccontextmanager
async def visiting(service: Service) -> AsyncIterator[Visit]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        try:
            visit = Visit(await browser.new_page(), service.url)
            await visit.open(KEY)
            yield visit
        finally:
            await browser.close()


async def test_the_embedded_model_remembers_a_name_in_a_conversation(service: Service):
    async with visiting(service) as visit:
        await visit.chat("My name is Tovin.")
        await visit.chat("What is my name?")
        await expect(visit.answers.last).to_contain_text("Tovin")


async def test_an_answer_has_the_form_of_a_schema(service: Service):
    """Set in the page, enforced by the service."""
    async with visiting(service) as visit:
        await visit.page.get_by_role("button", name="Settings of the answers").click()
        await visit.page.get_by_label("Form of the answer").select_option("json_schema")
        schema = visit.page.get_by_label("JSON schema")
        await schema.fill("{not json")
        await visit.page.get_by_role("button", name="Save").click()
        await expect(visit.page.get_by_role("dialog")).to_be_visible()
        await schema.fill('{"type": "object", "properties": {"n": {"enum": [7, 8]}}, "required": ["n"]}')
        await visit.page.get_by_role("button", name="Save").click()
        await visit.chat("A number, please.")
        text = await visit.answers.locator(".body").inner_text()

    assert json.loads(text)["n"] in (7, 8)


async def test_a_killed_worker_is_said_and_the_next_try_is_answered(start: Start):
    """The question is still there, and the conversation before it too."""
    service = start()
    async with visiting(service) as visit:
        await visit.chat("My name is Tovin.")
        worker = service.worker()
        worker.send_signal(signal.SIGSTOP)
        await visit.send("What is my name?")
        await expect(visit.answers).to_have_count(2)
        await visit.page.wait_for_timeout(500)
        worker.send_signal(signal.SIGKILL)
        problem = visit.page.get_by_role("alert")
        await expect(problem).to_be_visible(timeout=30_000)
        await expect(visit.questions.last).to_contain_text("What is my name?")
        for _ in range(20):
            await problem.get_by_role("button", name="Try again").click(timeout=60_000)
            await visit.ended()
            if await problem.count() == 0:
                break
        await expect(visit.answers.last).to_contain_text("Tovin")
