"""Open WebUI in Chromium: types a question into its page and reads the answer.

The page sends tools with each message, streams, and asks for a title and tags beside it.
"""

import os

import scenario as s
from playwright.sync_api import sync_playwright

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=["--no-sandbox"])
    page = browser.new_page()
    page.goto(os.environ["OPEN_WEBUI_URL"], wait_until="domcontentloaded", timeout=120_000)
    box = page.locator("#chat-input")
    box.wait_for(timeout=120_000)
    if page.get_by_role("button", name="Okay, Let's Go!").count():
        page.get_by_role("button", name="Okay, Let's Go!").click()
    box.click()
    page.keyboard.type(s.CHAT)
    page.keyboard.press("Enter")
    answer = page.locator("#response-content-container").last
    answer.get_by_text(".").first.wait_for(timeout=120_000)
    s.check("typed question", s.CHAT_ANSWER, answer.inner_text())
    browser.close()
