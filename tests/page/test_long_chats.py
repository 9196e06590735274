"""What takes the chat page more than a few seconds: a conversation of 2,000 messages."""

import os
from pathlib import Path

import pytest
from playwright.async_api import expect

from app.generation.sessions import Turn
from app.types import Message, Role
from tests.page.chat_page import CHROMIUM, PHONE, served
from tests.web.access import ADMIN_KEY

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(CHROMIUM is None and "REQUIRE_SERVICES" not in os.environ, reason="there is no Chromium"),
]


@pytest.mark.parametrize("viewport", [{"width": 1200, "height": 800}, PHONE], ids=["desk", "phone"])
async def test_a_session_of_two_thousand_messages_opens_at_its_end_and_goes_on(tmp_path: Path, viewport):
    """Only its latest messages are drawn, earlier ones on request, and the next answer knows the last turn."""
    history = {"max_turns": 2000, "max_bytes": 10_000_000}
    async with served(tmp_path, chat_history=history) as site, site.visit(viewport=viewport) as visit:
        principal = await site.running.container.keys.authenticate(ADMIN_KEY.encode())
        sessions = site.running.container.sessions
        assert principal is not None
        assert sessions is not None
        said = "**Answer {0}** with `code` and a list:\n\n- one\n- two\n\n```python\nprint({0})\n```"
        turns = [
            Turn((Message(Role.USER, f"question {n}"), Message(Role.ASSISTANT, said.format(n)))) for n in range(1000)
        ]
        await sessions.append(principal.tenant, "long", *turns)
        await visit.open()
        await visit.page.goto(f"{site.url}/#/s/long")
        await expect(visit.answers.last).to_contain_text("Answer 999")
        shown = await visit.answers.count()
        at_end = await visit.page.locator("#scroll").evaluate(
            "node => node.scrollHeight - node.scrollTop - node.clientHeight"
        )
        await visit.page.get_by_role("button", name="Show earlier messages (1940)").click()
        await expect(visit.answers).to_have_count(60)
        await visit.send("question 1000")
        await expect(visit.answers.last).to_contain_text("question 1000")
        await visit.ended()

    assert (30, True) == (shown, at_end < 5)
    assert "question 999" in site.engine.prompts[-1]
    assert [] == visit.problems
