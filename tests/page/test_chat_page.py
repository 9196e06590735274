"""The chat page in a real browser, against the real application: one browser and one service for all tests."""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Dialog, expect

from app.access.key_format import id_of
from app.access.page_link import new_code
from app.errors import EngineFailed, RateLimited
from tests.page.chat_page import CHROMIUM, PHONE, Site, Visit, served
from tests.unit.engine.test_adapter_source import make_adapter
from tests.web.access import ADMIN_KEY, running
from tests.web.harness import ScriptedService, Web

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None and "REQUIRE_SERVICES" not in os.environ, reason="there is no Chromium"),
    # A browser runs what these test.
    pytest.mark.no_cover,
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("page")
    make_adapter(folder / "adapters" / "pirate")
    async with served(folder, adapters={"roots": [str(folder / "adapters")]}) as site:
        yield site


async def test_a_link_signs_in_once(tmp_path: Path):
    """The code leaves the address at once; the second who opens the link, and who has no key, is asked for one."""
    async with served(tmp_path, security={"api_key": None}) as site:
        code = new_code(tmp_path, time.time())
        async with site.visit() as visit:
            await visit.page.goto(f"{site.url}/#key={code}")
            await expect(visit.draft).to_be_visible()
            address = visit.page.url
            await visit.page.reload()
            await expect(visit.draft).to_be_visible()
        async with site.visit() as second:
            await second.page.goto(f"{site.url}/#key={code}")
            await expect(second.page.get_by_role("alert")).to_contain_text("used already")

    assert f"{site.url}/" == address


async def test_a_conversation_has_a_memory(site: Site):
    """Figures stand below an answer, and a reload brings all of it back."""
    async with site.visit() as visit:
        await visit.open(await site.key())
        address = visit.page.url
        await visit.chat("My name is Tovin.")
        await visit.chat("What is it?")
        figures = await visit.answers.last.locator(".figures").inner_text()
        listed = await visit.sessions.all_inner_texts()
        cookies = await visit.page.context.cookies()
        await visit.page.reload()
        await expect(visit.questions).to_have_count(2)
        again = await visit.answers.last.inner_text()

    assert f"{site.url}/" == address
    assert "My name is Tovin.My name is Tovin.What is it?" in site.engine.prompts[-1]
    assert re.fullmatch(r"\d+ tokens · [\d.,]+ tokens/s · first after .+ · context \d+ of 8,192", figures)
    assert ["My name is Tovin."] == listed
    assert "What is it?" in again
    assert [] == cookies + visit.problems


async def test_a_wrong_key_is_refused_and_a_right_one_is_kept_only_on_request(site: Site):
    key = await site.key()
    async with site.visit() as visit:
        await visit.page.goto(site.url)
        await visit.page.get_by_label("API key").fill("llm_wrong")
        await visit.page.get_by_role("button", name="Start").click()
        await expect(visit.page.get_by_role("alert")).to_contain_text("not valid")
        await visit.page.get_by_label("API key").fill(key)
        await visit.page.get_by_role("button", name="Start").click()
        await expect(visit.draft).to_be_visible()
        in_tab = await where_the_key_is(visit)
        await visit.page.get_by_role("button", name="Key", exact=True).click()
        await visit.page.get_by_label("Keep it in this browser").check()
        await visit.page.get_by_role("button", name="Save").click()
        await expect(visit.page.locator("dialog")).to_have_count(0)
        in_browser = await where_the_key_is(visit)
        await visit.page.get_by_role("button", name="Key", exact=True).click()
        await visit.page.get_by_role("button", name="Forget the key").click()
        await expect(visit.page.get_by_label("API key")).to_be_visible()
        nowhere = await where_the_key_is(visit)

    assert [(None, key), (key, None), (None, None)] == [in_tab, in_browser, nowhere]


async def where_the_key_is(visit: Visit) -> tuple[Any, Any]:
    """Return what the browser keeps, and what only the tab does."""
    name = "'llm-service-key'"
    found: list[Any] = await visit.page.evaluate(f"[localStorage.getItem({name}), sessionStorage.getItem({name})]")
    return found[0], found[1]


async def test_a_stopped_answer_stays_and_the_next_one_knows_it(site: Site):
    """The service stores nothing of it before the conversation goes on."""
    key = await site.key()
    site.engine.says = ["Once ", "upon ", asyncio.Event()]
    async with site.visit() as visit:
        await visit.open(key)
        await visit.send("Tell a story")
        await expect(visit.answers).to_contain_text("Once")
        await visit.page.get_by_role("button", name="Stop").click()
        await expect(visit.answers).to_contain_text("You stopped this answer.")
        await visit.ended()
        before = await site.stored(key)
        site.engine.says = ()
        await visit.chat("Go on")
        after = await site.stored(key)

    assert [] == before
    assert "Tell a storyOnceGo on" in site.engine.prompts[-1].replace("Once ", "Once").replace("upon ", "")
    assert [2] == [session["turns"] for session in after]
    assert [] == visit.problems


async def test_too_many_requests_count_down_and_lose_nothing(site: Site):
    """The question stays, and the same button sends it again."""
    key = await site.key(limits={"requests_per_minute": 12, "burst": 1})
    async with site.visit() as visit:
        await visit.open(key)
        await visit.chat("first")
        await visit.send("second")
        problem = visit.page.get_by_role("alert")
        await expect(problem).to_contain_text("Too many requests with this key.")
        await expect(problem).to_contain_text(re.compile(r"Possible again in [1-5] s\."))
        again = problem.get_by_role("button", name="Try again")
        disabled = await again.is_disabled()
        await again.click()
        await visit.ended()
        await expect(visit.answers.last).to_contain_text("second")
        await expect(problem).to_have_count(0)

    assert disabled
    assert 2 == await questions_stored(site, key)


async def questions_stored(site: Site, key: str) -> int:
    return sum(session["turns"] for session in await site.stored(key))


async def test_an_engine_that_fails_in_the_middle_leaves_what_it_said(site: Site):
    """Said in words; to try again answers the same question, and what was typed meanwhile is untouched."""
    key = await site.key()
    site.engine.says = ["Half ", "an ", EngineFailed("The model's process ended.")]
    async with site.visit() as visit:
        await visit.open(key)
        await visit.send("Question")
        await expect(visit.page.get_by_role("alert")).to_contain_text("The model's process ended.")
        await expect(visit.answers).to_contain_text("Half")
        await visit.draft.fill("typed meanwhile")
        site.engine.says = ["A whole answer."]
        await visit.page.get_by_role("button", name="Try again").click()
        await expect(visit.answers).to_contain_text("A whole answer.")
        await visit.ended()
        draft = await visit.draft.input_value()

    assert "typed meanwhile" == draft
    assert 1 == await questions_stored(site, key)


async def test_a_lost_connection_is_said_and_the_message_survives_a_reload(site: Site):
    async with site.visit() as visit:
        await visit.open(await site.key())
        await visit.page.route("**/v1/chat", lambda route: route.abort())
        await visit.send("Precious words")
        await expect(visit.page.get_by_role("alert")).to_contain_text("The connection to the service was lost.")
        await visit.page.reload()
        await expect(visit.draft).to_have_value("Precious words")


async def test_refusals_of_the_service_are_said_in_words(site: Site):
    """503 is the service's doing, and has a time to try again."""
    for error, words in (
        (EngineFailed("It is restarting.", retry_after=7), "The service cannot answer now. It is restarting."),
        (RateLimited("Slow down.", retry_after=9), "Too many requests with this key. Slow down."),
    ):
        site.engine.says = [error]
        async with site.visit() as visit:
            await visit.open(await site.key())
            await visit.send("Question")
            await expect(visit.page.get_by_role("alert")).to_contain_text(words)


async def test_a_key_that_ends_is_asked_for_again_in_place(site: Site):
    """The conversation stays on the page, and the refused message is sent with the new key."""
    old, new = await site.key(owner="page-owner"), await site.key(owner="page-owner")
    async with site.visit() as visit:
        await visit.open(old)
        await visit.chat("first")
        await site.running.access.keys.revoke(old.split("_")[1])
        await visit.send("second")
        await visit.page.get_by_label("API key").fill(new)
        await visit.page.get_by_role("button", name="Start").click()
        await visit.page.get_by_role("button", name="Try again").click()
        await expect(visit.answers.last).to_contain_text("second")
        await visit.ended()
        stored = await site.stored(new)

    assert [2] == [session["turns"] for session in stored]


EVIL = """<script>window.evil = 1</script><img src=x onerror="window.evil = 1"><svg onload="window.evil = 1"></svg>
[click](javascript:window.evil=1) <a href="javascript:window.evil=1">here</a> ![x](http://evil.example/pixel.png)
<iframe srcdoc="<script>parent.evil = 1</script>"></iframe><style>body{display:none}</style><form action=/x><button>
<math><mtext><table><mglyph><style><img src onerror="window.evil = 1">

```html"onmouseover="window.evil=1
<img src=x onerror="window.evil = 1">
```

$\\href{javascript:window.evil=1}{x}$ $$\\text{<img src=x onerror="window.evil=1">}$$ <div
style="position:fixed">over</div>"""


async def test_markup_from_the_models_mouth_and_from_a_title_is_text(site: Site):
    """No script runs, nothing is loaded from elsewhere, and the policy has nothing to block."""
    key = await site.key()
    site.engine.says = [EVIL]
    dialogs: list[Dialog] = []
    requested: list[str] = []
    async with site.visit() as visit:
        visit.page.on("dialog", lambda dialog: dialogs.append(dialog))
        visit.page.on("request", lambda request: requested.append(request.url))
        await visit.open(key)
        await visit.chat("<img src=x onerror='window.evil = 1'> be evil")
        await visit.sessions.hover()
        await visit.page.get_by_role("button", name="Rename: ").click()
        await visit.page.get_by_label("Title").fill("<img src=x onerror='window.evil = 1'>&amp;")
        await visit.page.get_by_role("button", name="Rename", exact=True).click()
        await expect(visit.sessions).to_have_text("<img src=x onerror='window.evil = 1'>&amp;")
        await visit.page.reload()
        await expect(visit.answers).to_contain_text("<script>window.evil = 1</script>")
        body = visit.answers.locator(".body")
        found = await body.evaluate("node => node.innerHTML")
        await visit.page.wait_for_timeout(300)
        evil = await visit.page.evaluate("window.evil")

    assert evil is None
    assert [] == dialogs
    assert [] == [url for url in requested if not url.startswith(site.url)]
    # The only image is the icon of the button that copies.
    assert not re.search(r"<(?:script|img|svg(?! viewBox=\"0 0 24 24\")|iframe|style|form|input)\b", found)
    assert not re.search(r"<[^>]*\s(?:on\w+|style)=|<[^>]*javascript:", found)
    assert [] == visit.problems


async def test_markdown_code_and_maths_are_shown_as_such(site: Site):
    """Code has its language and a button to copy it; maths is MathML; links open elsewhere."""
    site.engine.says = [
        "# Title\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n```python\ndef f(x):\n    return x\n```\n\n"
        "Euler: $e^{i\\pi} + 1 = 0$, and\n\n$$\\int_0^1 x^2\\,dx = \\frac13$$\n\n"
        "[a link](https://example.org) and [none](v1/keys) costs $5 or $6"
    ]
    async with site.visit(permissions=["clipboard-read", "clipboard-write"]) as visit:
        await visit.open(await site.key())
        await visit.chat("markdown")
        answer = visit.answers
        await expect(answer.locator("math")).to_have_count(2)
        await expect(answer.locator(".hljs-keyword").first).to_have_text("def")
        await expect(answer.locator("table td").last).to_have_css("text-align", "right")
        await expect(answer.locator("math[display=block]")).to_have_count(1)
        await answer.get_by_role("button", name="Copy the code").click()
        copied = await visit.page.evaluate("navigator.clipboard.readText()")
        link = answer.get_by_role("link", name="a link")
        attributes = [await link.get_attribute(name) for name in ("target", "rel", "href")]
        await expect(answer.get_by_role("link")).to_have_count(1)
        text = await answer.inner_text()

    assert "def f(x):\n    return x" == copied
    assert ["_blank", "noopener noreferrer", "https://example.org"] == attributes
    assert "costs $5 or $6" in text
    assert [] == visit.problems


async def test_personal_data_is_marked_where_it_was_masked(site: Site):
    """In the question too, as soon as the service has it; the title tells nothing either."""
    async with site.visit() as visit:
        await visit.open(await site.key())
        await visit.chat("Write to jane.doe@example.com")
        marks = [await each.locator("mark").all_inner_texts() for each in (visit.questions, visit.answers)]
        title = await visit.sessions.inner_text()

    assert [["[EMAIL]"], ["[EMAIL]"]] == marks
    assert "Write to [EMAIL]" == title


async def test_an_answer_is_generated_again_and_a_question_edited_in_place(site: Site):
    """The service then has the new conversation and no longer the old one, under the same title."""
    key = await site.key()
    async with site.visit() as visit:
        await visit.open(key)
        await visit.chat("one")
        await visit.chat("two")
        first = (await site.stored(key))[0]["session_id"]
        site.engine.says = ["another answer"]
        await visit.answers.last.get_by_role("button", name="Generate again").click()
        await expect(visit.answers.last).to_contain_text("another answer")
        await visit.ended()
        regenerated = await site.stored(key)
        site.engine.says = ()
        await visit.questions.first.hover()
        await visit.questions.first.get_by_role("button", name="Edit and send again").click()
        await visit.page.get_by_label("Your message").fill("uno")
        await visit.page.get_by_label("Your message").press("Enter")
        await expect(visit.questions).to_have_count(1)
        await visit.ended()
        await expect(visit.answers).to_contain_text("uno")
        edited = await site.stored(key)

    assert [(2, "one")] == [(each["turns"], each["title"]) for each in regenerated]
    assert [(1, "one")] == [(each["turns"], each["title"]) for each in edited]
    assert 3 == len({first, regenerated[0]["session_id"], edited[0]["session_id"]})
    assert [] == visit.problems


async def test_conversations_are_found_renamed_and_deleted_at_the_side(site: Site):
    key = await site.key()
    async with site.visit() as visit:
        await visit.open(key)
        for text in ("otters", "badgers"):
            await visit.page.get_by_role("link", name="New chat").click()
            await expect(visit.questions).to_have_count(0)
            await visit.chat(text)
        await visit.page.get_by_label("Search conversations").fill("OTT")
        found = await visit.sessions.all_inner_texts()
        await visit.sessions.first.hover()
        await visit.page.get_by_role("button", name="Rename: otters").click()
        await visit.page.get_by_label("Title").fill("All about otters")
        await visit.page.get_by_role("button", name="Rename", exact=True).click()
        await expect(visit.sessions).to_have_text("All about otters")
        await visit.page.get_by_label("Search conversations").fill("")
        await visit.page.get_by_role("link", name="badgers").hover()
        await visit.page.get_by_role("button", name="Delete: badgers").click()
        await visit.page.get_by_role("button", name="Delete", exact=True).click()
        await expect(visit.sessions).to_have_count(1)
        await expect(visit.questions).to_have_count(0)
        left = await site.stored(key)

    assert ["otters"] == found
    assert ["All about otters"] == [each["title"] for each in left]


async def test_settings_reach_the_request_and_probabilities_are_shown(site: Site):
    """A system prompt, sampling, a stop text and the alternatives of each token; they survive a reload."""
    async with site.visit() as visit:
        await visit.open(await site.key())
        await visit.page.get_by_role("button", name="Settings of the answers").click()
        await visit.page.get_by_label("System prompt").fill("Be brief.")
        await visit.page.get_by_label("Temperature").fill("0.25")
        await visit.page.get_by_label("Stop texts").fill("END\nHALT")
        await visit.page.get_by_label("Probabilities").check()
        await visit.page.get_by_role("button", name="Save").click()
        await visit.page.reload()
        await visit.chat("abcENDdef")
        await visit.answers.get_by_role("button", name="Show the probabilities").click()
        await visit.answers.locator(".tokens .token").nth(1).hover()
        await expect(visit.answers.locator(".odds-card")).to_contain_text("100.0 %")
        tokens = await visit.answers.locator(".tokens .token").all_inner_texts()
    sampling = site.engine.requests[-1].sampling

    assert ["a", "b", "c"] == tokens
    assert (0.25, 5) == (sampling.temperature, sampling.logprobs)
    assert "Be brief." in site.engine.prompts[-1]
    assert [] == visit.problems


async def test_an_adapter_stands_below_its_model_and_is_used_where_it_is_chosen(site: Site):
    async with httpx.AsyncClient(base_url=site.url, headers={"X-API-Key": ADMIN_KEY}) as http:
        loaded = await http.post("/v1/adapters/load", json={"adapter_name": "pirate", "source": "pirate"})
        assert 200 == loaded.status_code, loaded.text
    async with site.visit() as visit:
        await visit.open()
        choice = visit.page.get_by_label("Model", exact=True)
        names = await choice.locator("option").all_inner_texts()
        await choice.select_option("pirate")
        await visit.page.reload()
        await expect(choice).to_have_value("pirate")
        await visit.chat("Ahoy")

    assert ["echo", "+ pirate"] == names
    assert "pirate" == site.engine.adapters[-1]
    assert [] == visit.problems


async def test_a_model_that_is_not_loaded_is_loaded_from_the_page(site: Site, tmp_path: Path):
    """By those who may load models; others are told that they may not."""
    models = [{"name": "unused", "served_name": "second", "engine": "echo"}]
    async with running(tmp_path, models=models) as app, Web(app.app, ScriptedService()).listening() as port:
        other = replace(site, running=app, url=f"http://127.0.0.1:{port}")
        async with other.visit() as visit:
            await visit.open(await app.key())
            await visit.page.get_by_label("Model", exact=True).select_option("second")
            await visit.page.get_by_role("button", name="Load", exact=True).click()
            await expect(visit.page.locator(".model-state")).to_contain_text("This key may not do that")
        async with other.visit() as visit:
            await visit.open()
            await visit.page.get_by_label("Model", exact=True).select_option("second")
            await visit.page.get_by_role("button", name="Load", exact=True).click()
            await expect(visit.page.get_by_role("button", name="Load", exact=True)).to_have_count(0)
            await visit.chat("hello second")
            model = await visit.answers.locator(".figures").get_attribute("title")

    assert "second" == model


async def test_an_administrator_makes_a_key_limits_rotates_and_revokes_it(site: Site):
    """Its secret is shown once, and works."""
    async with site.visit() as visit:
        await visit.open()
        await visit.page.get_by_role("link", name="Administration").click()
        await visit.page.get_by_role("button", name="New key").click()
        await visit.page.get_by_label("Owner").fill("page-tests")
        await visit.page.get_by_label("Tokens a month").fill("5000")
        await visit.page.get_by_role("button", name="Create").click()
        secret = await visit.page.locator(".secret").inner_text()
        await visit.page.get_by_role("button", name="Done").click()
        row = visit.page.get_by_role("row", name="page-tests")
        await expect(row).to_contain_text("Tokens a month: 5,000")
        works = await site.stored(secret)
        await row.get_by_role("button", name="Edit").click()
        await visit.page.get_by_label("Tokens a month").fill("6000")
        await visit.page.get_by_role("button", name="Save").click()
        await expect(row).to_contain_text("Tokens a month: 6,000")
        await row.get_by_role("button", name="Rotate").click()
        await visit.page.get_by_role("button", name="Rotate", exact=True).click()
        rotated = await visit.page.locator(".secret").inner_text()
        await visit.page.get_by_role("button", name="Done").click()
        await row.get_by_role("button", name="Revoke").click()
        await visit.page.get_by_role("button", name="Revoke", exact=True).click()
        await expect(row).to_contain_text("revoked")

    assert [] == works
    assert rotated != secret
    assert [] == visit.problems


async def test_roles_usage_and_live_figures_are_shown_to_administrators_only(site: Site):
    async with site.visit() as visit:
        await visit.open(await site.key())
        await expect(visit.page.get_by_role("link", name="Administration")).to_be_hidden()
    async with site.visit() as visit:
        await visit.open()
        await visit.chat("some tokens")
        await visit.page.get_by_role("link", name="Administration").click()
        await visit.page.get_by_role("link", name="Roles").click()
        await visit.page.get_by_role("button", name="New role").click()
        await visit.page.get_by_label("Name", exact=True).fill("reader")
        await visit.page.get_by_role("button", name="Save").click()
        await expect(visit.page.get_by_role("heading", name="reader")).to_be_visible()
        await visit.page.get_by_role("link", name="Live").click()
        await expect(visit.page.get_by_text("Tokens a second")).to_be_visible()
        await expect(visit.page.get_by_role("row", name="echo")).to_contain_text("ready")
        for _ in range(20):
            await visit.page.get_by_role("link", name="Usage").click()
            await expect(visit.page.get_by_text("Prompt tokens")).to_be_visible()
            if await visit.page.locator(".chart").count():
                break
            await visit.page.get_by_role("link", name="Roles").click()
            await expect(visit.page.get_by_role("heading", name="reader")).to_be_visible()
        await expect(visit.page.locator(".chart .bar")).not_to_have_count(0)
        await expect(visit.page.get_by_text("Tokens by model")).to_be_visible()

    assert [] == visit.problems


async def test_a_role_that_may_use_no_model_gets_none_by_an_edit_of_something_else(site: Site):
    """An empty list is no model, and null all of them: a form that took one for the other would give them away."""
    async with site.running.client() as client, site.visit() as visit:
        await client.put("/v1/roles/locked", json={"rights": {"models": []}})
        await visit.open()
        await visit.page.get_by_role("link", name="Administration").click()
        await visit.page.get_by_role("link", name="Roles").click()
        card = visit.page.get_by_role("region", name="locked")
        await expect(card).to_contain_text("No model")
        await card.get_by_role("button", name="Edit").click()
        await visit.page.get_by_label("Requests a minute").fill("7")
        await visit.page.get_by_role("button", name="Save").click()
        await expect(card).to_contain_text("Requests a minute: 7")
        untouched = (await client.get("/v1/roles/locked")).json()["rights"]["models"]
        await card.get_by_role("button", name="Edit").click()
        await visit.page.get_by_label("Models", exact=True).fill("a\n b")
        await visit.page.get_by_role("button", name="Save").click()
        await expect(card).to_contain_text("Models: a, b")
        await card.get_by_role("button", name="Edit").click()
        await visit.page.get_by_label("All models").check()
        await visit.page.get_by_role("button", name="Save").click()
        await expect(card).to_contain_text("All models")
        opened = (await client.get("/v1/roles/locked")).json()["rights"]["models"]

    assert ([], None) == (untouched, opened)


async def test_usage_is_shown_of_more_keys_than_a_page_of_the_list_has(tmp_path: Path):
    async with served(tmp_path) as site:
        newest = [await site.key() for _ in range(201)][-1]
        async with site.visit() as visit:
            await visit.open()
            await visit.page.goto(f"{site.url}/#/admin/usage")
            await visit.page.get_by_label("Key", exact=True).select_option(id_of(newest))
            await expect(visit.page.get_by_text("Nothing was used in this month.")).to_be_visible()

    assert [] == visit.problems


async def test_a_phone_shows_all_of_it_without_scrolling_sideways(site: Site):
    site.engine.says = [
        "A very long word " + "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n|" + "a|" * 40 + "\n|" + "-|" * 40
    ]
    async with site.visit(viewport=PHONE, has_touch=True) as visit:
        await visit.open(await site.key())
        await visit.chat("long")
        wide = await visit.page.evaluate("document.documentElement.scrollWidth")
        inner = await visit.page.locator("#scroll").evaluate("node => node.scrollWidth - node.clientWidth")
        await expect(visit.page.get_by_label("Search conversations")).not_to_be_in_viewport()
        await visit.page.get_by_role("button", name="Conversations").click()
        await expect(visit.page.get_by_label("Search conversations")).to_be_in_viewport()
        await visit.sessions.click()
        await visit.page.get_by_role("button", name="Close the list").click()
        await expect(visit.page.get_by_label("Search conversations")).not_to_be_in_viewport()

    assert (PHONE["width"], 0) == (wide, inner)


async def test_right_to_left_text_runs_from_the_right(site: Site):
    site.engine.says = ["שלום, מה שלומך?\n\nAnd in English."]
    async with site.visit() as visit:
        await visit.open(await site.key())
        await visit.chat("مرحبا بك")
        directions = [
            await each.evaluate("node => getComputedStyle(node).direction")
            for each in (visit.questions.locator(".body"), *await visit.answers.locator("p[dir]").all())
        ]

    assert ["rtl", "rtl", "ltr"] == directions


async def test_the_keyboard_alone_is_enough(site: Site):
    """From the beginning of the page to the field, and from there to what can be done with an answer."""
    async with site.visit() as visit:
        await visit.open(await site.key())
        await visit.page.get_by_role("link", name="Skip to the message field").press("Enter")
        await expect(visit.draft).to_be_focused()
        await visit.page.keyboard.type("first line")
        await visit.page.keyboard.press("Shift+Enter")
        await visit.page.keyboard.type("second")
        await visit.page.keyboard.press("Enter")
        await expect(visit.answers).to_contain_text("second")
        await visit.ended()
        requests = len(site.engine.requests)
        again = visit.answers.get_by_role("button", name="Generate again")
        for _ in range(6):
            await visit.page.keyboard.press("Shift+Tab")
            if await again.evaluate("node => node === document.activeElement"):
                await visit.page.keyboard.press("Enter")
                break
        await visit.ended()
        await expect(visit.answers).to_contain_text("second")

    assert requests + 1 == len(site.engine.requests)


async def violations(visit: Visit) -> list[Any]:
    """Return what axe finds serious or critical."""
    found = await Axe().run(visit.page)
    return [
        (each["id"], each["impact"], each["nodes"][0]["html"])
        for each in found.response["violations"]
        if each["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_stands_in_the_way_of_a_screen_reader(site: Site, scheme: Any):
    """axe-core finds nothing serious: names, roles, contrasts, order, in every part of the page."""
    site.engine.says = [
        "# A\n\ntext `code` [EMAIL]\n\n```js\nlet x = 1; // why\n```\n\n| a |\n|---|\n| 1 |\n\n- [x] done\n\n$x^2$"
    ]
    found: dict[str, list[Any]] = {}
    async with site.visit(color_scheme=scheme, reduced_motion="reduce") as visit:
        await visit.page.goto(site.url)
        await expect(visit.page.get_by_label("API key")).to_be_visible()
        found["sign in"] = await violations(visit)
        await visit.open()
        await visit.chat("accessible?")
        found["chat"] = await violations(visit)
        site.engine.says = [RateLimited("Slow down.", retry_after=9)]
        await visit.send("refused")
        await expect(visit.page.get_by_role("alert")).to_be_visible()
        found["refused"] = await violations(visit)
        await visit.page.get_by_role("button", name="Settings of the answers").click()
        found["settings"] = await violations(visit)
        await visit.page.keyboard.press("Escape")
        for tab in ("keys", "roles", "usage", "live"):
            await visit.page.goto(f"{site.url}/#/admin/{tab}")
            await expect(visit.page.get_by_role("heading", level=2)).to_be_visible()
            found[tab] = await violations(visit)

    assert {} == {place: each for place, each in found.items() if each}
