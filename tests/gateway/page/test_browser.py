"""The page in a real Chromium, against a real service."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.stack import Stack

DEMO = Path(__file__).parents[3] / "examples" / "demo-model"
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE_MS = 60_000
STEP_US = 50_000
HARMFUL = (
    "<script>window.harm = 1</script> <img src=x onerror='window.harm = 1'> <svg onload='window.harm = 1'></svg>\n\n"
    "[link](javascript:window.harm=1) [data](data:text/html,x) ![i](https://evil.example/pixel.png) "
    "<a href='https://a.example' onclick='window.harm = 1'>x</a> <style>*{display:none}</style> "
    "<form action='https://evil.example'><input></form> <iframe src='https://evil.example'></iframe> **bold**"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Stack]:
    options = ["--engine", "simulated", "--engine-options", json.dumps({"step_us": STEP_US})]
    with Stack(tmp_path_factory.mktemp("page"), "--model", str(DEMO), *options) as running:
        yield running


@pytest.fixture
def page(browser: Browser, stack: Stack) -> Iterator[Page]:
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(PATIENCE_MS)
    page = context.new_page()
    foreign: list[str] = []
    page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith(stack.url) else None)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(stack.url)
    expect(page.locator("#model option")).to_have_count(1)
    yield page
    context.close()
    assert not foreign, foreign
    assert not faults, faults


def ask(page: Page, text: str, tokens: int) -> None:
    page.fill("#max_tokens", str(tokens))
    page.fill("#text", text)
    page.press("#text", "Enter")
    expect(page.locator("li.assistant").last).not_to_have_text("assistant")


def ended(page: Page) -> str:
    """The text of the last answer, once it is whole."""
    expect(page.locator("#stop")).to_be_hidden()
    return page.locator("li.assistant").last.inner_text()


def test_an_answer_goes_on_through_a_reload_and_a_killed_gateway(page: Page, stack: Stack) -> None:
    page.fill("#seed", "7")
    page.fill("#temperature", "1")
    ask(page, "Tell me something", 100)
    undisturbed = ended(page)
    page.click("#clear")
    ask(page, "Tell me something", 100)
    page.reload()
    expect(page.locator("li.assistant")).to_have_count(1)
    stack.kill("gateway")
    assert ended(page) == undisturbed
    expect(page.locator("#state")).to_have_text("Ended at the limit of tokens.")


def test_an_answer_can_be_stopped(page: Page) -> None:
    ask(page, "Talk for ever", 2000)
    page.click("#stop")
    ended(page)
    expect(page.locator("#state")).to_have_text("Stopped.")


def test_tokens_show_their_alternatives_and_a_request_its_code(page: Page) -> None:
    page.check("#alternatives")
    ask(page, "Hello", 8)
    ended(page)
    expect(page.locator(".token")).to_have_count(8)
    others = page.locator(".token").nth(3).locator(".others")
    expect(others).to_be_hidden()
    page.locator(".token").nth(3).hover()
    expect(others).to_be_visible()
    assert others.text_content().count("%") == 5  # type: ignore[union-attr]
    page.click("#code summary")
    page.fill("#text", "It's 'quoted'")
    curl = page.locator("#as-curl").text_content() or ""
    assert "/v1/chat/completions" in curl
    assert "It'\\''s '\\''quoted'\\''" in curl


def test_a_fault_of_the_settings_and_of_the_service_is_said(page: Page) -> None:
    page.click("details:has(#schema) summary")
    page.fill("#schema", "{")
    page.fill("#text", "Hello")
    page.press("#text", "Enter")
    expect(page.locator("#state")).to_contain_text("the JSON schema:")
    page.fill("#schema", "")
    page.fill("#temperature", "7")
    page.press("#text", "Enter")
    expect(page.locator("#state")).to_contain_text("temperature")
    expect(page.locator("#text")).to_have_value("Hello")  # nothing is lost


def test_what_a_model_writes_does_no_harm(page: Page) -> None:
    page.evaluate(
        "async (text) => { const { markdown } = await import('/ui/render.js');"
        " document.querySelector('#messages').append(markdown(text)); }",
        HARMFUL,
    )
    expect(page.locator("#messages strong")).to_have_text("bold")
    assert page.locator("#messages").locator("script, img, svg, style, form, input, iframe").count() == 0
    assert page.locator("#messages a[href]").count() == 1  # the one with a plain address
    assert page.locator("#messages a[onclick]").count() == 0
    assert page.evaluate("window.harm") is None


def test_the_dashboard_shows_the_service_as_it_is(page: Page) -> None:
    page.click("#to-board")
    expect(page.locator(".model h2")).to_contain_text("demo-model · ready")
    expect(page.locator(".model table").first).to_contain_text("serving")
    page.click("#to-chat")
    ask(page, "Hello", 60)
    page.click("#to-board")
    expect(page.locator(".model > p").first).to_contain_text("Running sequences: 1.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_and_a_phone_needs_no_sideways_scrolling(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 360, "height": 740})
    page.check("#alternatives")
    ask(page, "Hello", 5)
    ended(page)
    for view in ("#to-chat", "#to-board"):
        page.click(view)
        found = Axe().run(page).response["violations"]
        assert not [fault["id"] for fault in found if fault["impact"] in ("serious", "critical")], found
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
