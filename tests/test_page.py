"""The page of `steerbridge serve` in a browser, with the demo vision-language model."""

from __future__ import annotations

import re
import shutil

import pytest
import requests

import helpers
import servers
from helpers import CLI

pytest.importorskip("llama_cpp")
pytest.importorskip("fastapi")
pytest.importorskip("torch")
pytest.importorskip("playwright")

from playwright.sync_api import expect, sync_playwright

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed"),
]

NEW = 24
KEY = "a key of nobody"
# Chromium as root in a container; and nothing but the page may reach the network.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def pictured(tmp_path_factory, demo_files):
    """A guard for four drawings, the prompts with them, and the answers."""
    return helpers.drawn_guard(tmp_path_factory.mktemp("page"), demo_files, NEW)


@pytest.fixture(scope="module")
def url(pictured, tmp_path_factory, demo_files):
    """A server with that guard, a key, and unsteered answers allowed."""
    package, _, _ = pictured
    command = [*CLI, "serve", "--package", package]
    command += ["--model", demo_files["text_f32"], "--mmproj", demo_files["mmproj_f32"]]
    command += ["--context", 2048, "--allow-unsteered", "--show-scores"]
    output = tmp_path_factory.mktemp("log") / "serve.txt"
    key = {"STEERBRIDGE_API_KEY": KEY}
    with servers.running(command, output, environment=key) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, url):
    """The loaded page; checks afterwards that it had no errors and contacted no other host."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    opened.asked, problems = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(url)
    opened.get_by_label("API key").fill(KEY)
    opened.get_by_label("API key").press("Tab")
    expect(opened.locator("#model")).to_contain_text("guarded by test")
    yield opened
    assert not problems
    assert all(u.startswith((url, "data:", "blob:")) for u in opened.asked), opened.asked
    context.close()


def ask(page, prompt):
    page.locator("#image").set_input_files(str(prompt.images[0]))
    expect(page.get_by_alt_text("The picture that will be sent")).to_be_visible()
    page.get_by_label("Message", exact=True).fill(prompt.text)
    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=60_000)


def test_a_chat_with_a_picture_shows_its_verdict(page, pictured):
    _, prompts, answers = pictured
    for prompt, answer in zip(prompts[:2], answers[:2], strict=True):
        page.get_by_role("button", name="New chat").click()
        ask(page, prompt)
        box = page.locator(".answer")
        expect(box).to_have_count(1)
        verdict = box.locator(".verdict li")
        score, word = answer.outcome.verdicts[0].score, "fired" if prompt.harmful else "quiet"
        expect(verdict).to_contain_text(word)
        shown = re.search(r"p: (-?[\d.]+)", verdict.inner_text())
        assert float(shown[1]) == pytest.approx(score, abs=2e-4)
        expect(box.locator("h2")).to_have_text("steered" if prompt.harmful else "left alone")
        text = box.locator(".text").inner_text()
        assert text.startswith(answer.text.strip()[:20])
        expect(page.locator(".question img")).to_be_visible()
    assert sorted(p.harmful for p in prompts[:2]) == [False, True]


def test_the_unsteered_answer_beside_it(page, pictured):
    _, prompts, _ = pictured
    harmful = next(p for p in prompts if p.harmful)
    page.get_by_label("unsteered beside it").check()
    ask(page, harmful)
    boxes = page.locator(".answer")
    expect(boxes).to_have_count(2)
    expect(boxes.nth(1).locator("h2")).to_have_text("unsteered")
    expect(boxes.nth(1).locator(".verdict li")).to_have_count(0)
    first, second = (boxes.nth(i).locator(".text").inner_text() for i in (0, 1))
    assert first != second
    page.get_by_label("unsteered beside it").uncheck()
    page.get_by_role("button", name="New chat").click()
    ask(page, harmful)  # the package is attached again
    expect(boxes).to_have_count(1)
    expect(boxes.locator(".verdict li")).to_contain_text("fired")


def test_a_second_turn_goes_on(page, pictured):
    _, prompts, _ = pictured
    quiet = next(p for p in prompts if not p.harmful)
    ask(page, quiet)
    page.get_by_label("Message", exact=True).fill("And what colour is it?")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=60_000)
    expect(page.locator(".question")).to_have_count(2)


def test_a_refused_turn_is_left_out_and_that_is_said(page, pictured):
    _, prompts, _ = pictured
    harmful = next(p for p in prompts if p.harmful)
    ask(page, harmful)
    expect(page.locator(".turn .note").last).to_have_text(
        "This turn is left out of what is sent next."
    )
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_label("Message", exact=True).fill("Hello")
        page.get_by_label("Message", exact=True).press("Enter")
    assert [m["content"] for m in sent.value.post_data_json["messages"]] == ["Hello"]
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=60_000)


def test_a_system_message_a_copy_and_another_answer(page):
    page.get_by_text("System message").first.click()
    page.get_by_label("System message").fill("Be short.")
    page.get_by_label("Message", exact=True).fill("Name a colour.")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_label("Message", exact=True).press("Enter")
    assert [m["role"] for m in sent.value.post_data_json["messages"]] == ["system", "user"]
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=60_000)
    expect(page.locator(".answer .note").last).to_have_text(
        re.compile("The answer (is whole|was cut at its limit)")
    )
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("status")).to_have_text("Copied.")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == page.locator(".answer .text").inner_text().strip()
    with page.expect_request("**/v1/chat/completions") as again:
        page.get_by_role("button", name="Regenerate").click()
    assert again.value.post_data_json["messages"] == sent.value.post_data_json["messages"]
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=60_000)
    expect(page.locator(".turn")).to_have_count(1)


def test_the_chat_survives_a_reload(page, pictured):
    _, prompts, _ = pictured
    ask(page, next(p for p in prompts if not p.harmful))
    text = page.locator(".answer .text").inner_text()
    page.reload()
    expect(page.locator(".answer .text")).to_have_text(text)
    expect(page.locator(".question img")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)


def test_keys_alone_are_enough(page):
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("Hello there")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("friend")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=60_000)
    expect(page.locator(".question .text")).to_have_text("Hello there\nfriend")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.locator("#card summary").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#facts")).to_contain_text("layer_input[18] @ prompt_end")


def test_errors_are_said(browser, url):
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    expect(page.get_by_role("status")).to_have_text("The server asks for its API key.")
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.get_by_role("status")).to_contain_text("expected the server's API key")
    expect(page.locator(".turn > .fired")).to_contain_text("not part of the chat")
    context.close()


def test_words_of_a_person_are_never_markup(page):
    text = "<img src=x onerror=alert(1)>"
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.locator(".question .text")).to_have_text(text)
    expect(page.locator(".question img")).to_have_count(0)
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=60_000)


def test_every_control_has_a_name(page):
    for control in page.locator("button, input, textarea, summary, meter, img").all():
        if control.is_visible():
            name = control.evaluate(
                "e => e.labels?.[0]?.textContent || e.ariaLabel || e.alt || e.textContent"
            )
            assert name.strip(), control.evaluate("e => e.outerHTML")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, url, scheme):
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto(url)
    expect(opened.get_by_label("Message", exact=True)).to_be_visible()
    width = opened.evaluate("document.documentElement.scrollWidth")
    assert width <= 360
    context.close()


def test_the_page_may_load_nothing_else(url):
    answer = requests.get(url, timeout=10)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search(r"https?://", answer.text)
    for name in ("page.js", "page.css"):
        assert requests.get(f"{url}/page/{name}", timeout=10).status_code == 200
    for path in ("/page/..%2fapp.py", "/page/%2e%2e/app.py"):
        assert requests.get(url + path, timeout=10).status_code in (401, 404)


def test_a_server_that_hides_scores(browser, tmp_path):
    """The page says what fired, and no figure."""
    command = [*CLI, "serve", "--context", 256]
    with servers.running(command, tmp_path / "log") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_label("Message", exact=True).fill("Hello")
        page.get_by_label("Message", exact=True).press("Enter")
        expect(page.locator(".verdict li").first).to_contain_text("quiet")
        assert not re.search(r"\d\.\d", page.locator(".verdict").inner_text())
        page.close()


def test_unsteered_answers_are_off_by_default(tmp_path):
    command = [*CLI, "serve", "--context", 256]
    with servers.running(command, tmp_path / "log") as server:
        info = requests.get(f"{server.url}/info", timeout=10).json()
        assert info["steering"]["unsteered"] is False
        body = {"messages": [{"role": "user", "content": "Hello"}], "steering": False}
        answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
        assert answer.status_code == 403
        assert "--allow-unsteered" in answer.json()["error"]["message"]
