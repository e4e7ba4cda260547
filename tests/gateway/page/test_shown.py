"""What the page shows of answers whose every character is scripted, in a real Chromium: JSON, calls, thoughts, harmful
text; the code that it offers runs; a key stays in its tab."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from protocol.messages import Frame
from tests.gateway.backend import Backend
from tests.gateway.front import Front
from tests.gateway.page.test_browser import ARGS, HARMFUL, PATIENCE_MS
from tests.gateway.test_auth import write_keys
from tests.gateway.test_tools import ARGUMENTS, CALLS, FORMAT, WEATHER, script

THOUGHT = "<b>hm</b>"


@pytest.fixture
async def backend(redis_url: str, raw: Any) -> AsyncIterator[Backend]:
    async with Backend(redis_url, format=FORMAT) as running:
        yield running


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=ARGS)
        yield browser
        await browser.close()


async def opened(browser: Browser, front: Front) -> Page:
    context = await browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(PATIENCE_MS)
    page = await context.new_page()
    await page.goto(front.url)
    return page


async def ask(page: Page, text: str = "hi") -> None:
    """Send it and wait for the whole answer."""
    shown = await page.locator("li.assistant").count()
    await page.fill("#text", text)
    await page.press("#text", "Enter")
    await expect(page.locator("li.assistant")).to_have_count(shown + 1)
    await expect(page.locator("#stop")).to_be_hidden()


async def told(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()


async def test_json_calls_and_thoughts_are_shown_as_what_they_are_and_no_text_does_harm(
    browser: Browser, front: Front, backend: Backend
) -> None:
    page = await opened(browser, front)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.click("details:has(#schema) summary")
    await page.fill("#schema", "{}")
    backend.script = script([(1, '{"city": '), (1, '"Bern", "n": [1]}')])
    await ask(page)
    await expect(page.locator("li.assistant pre")).to_have_text('{\n  "city": "Bern",\n  "n": [\n    1\n  ]\n}')
    await page.fill("#schema", "")

    await page.click("details:has(#tools) summary")
    await page.fill("#tools", json.dumps([WEATHER]))
    backend.script = script(CALLS)
    await ask(page)
    calls = page.locator("li.assistant").last.locator(".call")
    await expect(calls.locator("code")).to_have_text(["weather", "weather"])
    await expect(calls.locator("pre").last).to_contain_text('"city": "Bern"')
    assert len(ARGUMENTS) == await calls.count()
    await page.fill("#tools", "")

    await page.click("#clear")
    backend.script = script([(1, THOUGHT), (303, "</think>"), *((1, piece) for piece in HARMFUL.partition("[link]"))])
    await ask(page, "and now?")  # a question is thought about
    answer = page.locator("li.assistant")
    await expect(answer.locator("strong")).to_have_text("bold")
    await expect(answer.locator(".thought")).to_have_text(THOUGHT)
    assert await answer.locator("script, img, svg, style, form, input, iframe, b").count() == 0
    assert await answer.locator("a[href]").count() == 1
    assert await answer.locator("a[onclick]").count() == 0
    assert await page.evaluate("window.harm") is None
    assert all(url.startswith(front.url) for url in asked), asked


async def test_the_code_that_is_shown_runs(browser: Browser, front: Front, backend: Backend) -> None:
    page = await opened(browser, front)
    await expect(page.locator("#model option")).to_have_count(1)
    said = "It's 'quoted', \"twice\", and ''''four times'''' \\ $HOME"
    backend.script = lambda record, _choice, index: (
        Frame(1, f"<{(record.job.messages or [])[-1]['content']}>") if index == 0 else Frame(5, "", "stop")
    )
    await page.click("#code summary")
    await page.fill("#text", said)
    python = await page.locator("#as-python").text_content() or ""
    assert await told(sys.executable, "-c", python) == f"<{said}>"
    curl = await page.locator("#as-curl").text_content() or ""
    assert f"<{said}>" in (await told("bash", "-c", f"{curl} -s")).replace('\\"', '"').replace("\\\\", "\\")


async def test_a_key_is_this_tabs_and_an_admins_shows_the_service(
    browser: Browser, open_gateway: Any, backend: Backend, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, ann={"admin": True}, bob={})
    front = await open_gateway(api_keys_file=str(keys))
    page = await opened(browser, front)
    await expect(page.locator("#state")).to_contain_text("API key")
    await page.fill("#key", "key-bob")
    await page.press("#key", "Enter")
    await expect(page.locator("#model option")).to_have_count(1)
    backend.script = script([(1, "for bob")])
    await ask(page)
    await expect(page.locator("li.assistant")).to_contain_text("for bob")
    assert backend.running[-1].record.tenant == "bob"
    await page.reload()
    await expect(page.locator("#model option")).to_have_count(1)
    await page.click("#to-board")
    await expect(page.locator("#board-state")).to_contain_text("tenant bob")
    await expect(page.locator(".tile")).to_have_count(0)
    await page.fill("#key", "key-ann")
    await page.press("#key", "Enter")
    await expect(page.locator(".tile")).not_to_have_count(0)
    await expect(page.locator(".model")).to_contain_text("Leader backend, term 1")
    assert await page.evaluate("localStorage.length") == 0
    another = await page.context.new_page()
    await another.goto(front.url)
    assert await another.input_value("#key") == ""
