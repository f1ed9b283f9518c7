"""The page in a real browser, on a whole server with a tiny model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, why_not
from test_serve import Server

from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
PREFIX = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    found = Server(model, "--dtype", "float32", "--max-total-tokens", "16384", "--served-model-name", "tiny")
    try:
        yield found.wait_ready()
    finally:
        found.close()


@pytest.fixture(scope="module")
def window(server: Server) -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(window: Any, server: Server) -> Any:
    window.get(server.url)
    shows(window, "#status-text", lambda text: text == "ready")
    yield window
    # What the policy forbids, and scripts that fail, are told in the console.
    log = [entry for entry in window.get_log("browser") if entry["level"] == "SEVERE"]
    told = [entry["message"] for entry in log if "503" not in entry["message"] and "400" not in entry["message"]]
    assert not told, told


def find(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def shows(page: Any, selector: str, wanted: Callable[[str], bool], seconds: float = 60) -> str:
    """Wait until an element's text is as wanted."""
    end, text = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        found = page.find_elements("css selector", selector)
        text = found[-1].text if found else ""
        if found and wanted(text):
            return text
        time.sleep(0.1)
    raise AssertionError(f"{selector} shows {text!r}")


def settings(page: Any, **values: Any) -> None:
    for name, value in values.items():
        page.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, str(value))


def say(page: Any, text: str) -> None:
    find(page, "#prompt").send_keys(text + "\n")


def nodes(page: Any) -> list[dict[str, Any]]:
    return page.execute_script(
        "return [...document.querySelectorAll('#tree li')].map(li => ({"
        "text: li.querySelector('.node code').textContent, badges: li.querySelector('.node').innerText,"
        "depth: (function d(e, n) { return e.id === 'tree' ? n : d(e.parentElement, n + (e.tagName === 'UL')) })"
        "(li.parentElement, 0)}))"
    )


def test_a_chat_is_answered_on_screen(page: Any) -> None:
    assert find(page, "#model").text == "tiny" and page.title == "Phloem: tiny"
    settings(page, temperature=0, max_tokens=24)
    say(page, "Hello?")
    assert find(page, ".turn.user").text == "Hello?"
    facts = shows(page, ".turn.assistant .facts", lambda text: "in the prompt" in text)
    assert "tokens" in facts
    assert not page.find_elements("css selector", ".turn.failed")
    assert find(page, "#used").text.endswith("tokens in this conversation")
    say(page, "And then?")
    shows(page, "#log", lambda text: text.count("in the prompt") == 2)
    # The second turn sends the first again, and finds it in the cache.
    second = page.find_elements("css selector", ".facts")[1].text
    assert "0 of them cached" not in second
    find(page, "#fresh").click()
    assert not page.find_elements("css selector", ".turn") and find(page, "#empty").is_displayed()


def test_the_tree_grows_where_two_prompts_begin_alike(page: Any, server: Server) -> None:
    assert server.get("/flush_cache").status_code == 200
    shows(page, "#tree-empty", lambda text: "Nothing is cached" in text)
    assert server.generate(PREFIX + "one thing and then this and that").status_code == 200
    shows(page, "#tree-text", lambda text: text.startswith("1 node,"))
    assert server.generate(PREFIX + "another story, from the beginning").status_code == 200
    shows(page, "#tree-text", lambda text: text.startswith("3 nodes,"))
    found = nodes(page)
    assert [node["depth"] for node in found] == [0, 1, 1]
    assert found[0]["text"].startswith("The quick") and "1 hit" in found[0]["badges"] and "tok" in found[0]["badges"]
    shows(page, "#memory-text", lambda text: " 0 tokens in use" not in text and "cached, of 16,384" in text)
    # By keyboard alone: into the tree, down, closed, open, details.
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.querySelector('#tree li[tabindex=\"0\"]').focus()")
    focused = page.switch_to.active_element
    assert focused.get_attribute("aria-expanded") == "true"
    focused.send_keys(Keys.ARROW_LEFT)
    assert focused.get_attribute("aria-expanded") == "false"
    focused.send_keys(Keys.ARROW_RIGHT)
    focused.send_keys(Keys.ARROW_DOWN)
    inner = page.switch_to.active_element
    assert inner != focused
    inner.send_keys(Keys.ENTER)
    assert "First token ids" in shows(page, "#tree li li .about:not([hidden])", lambda text: "Nobody holds it" in text)


def test_markdown_is_text_and_never_html(page: Any) -> None:
    source = (
        "# Title\n\nA **bold** word, `code`, [a link](https://example.org/x) and <img src=x onerror=alert(1)>.\n\n"
        "- one\n- two\n  - inner\n\n```python\nprint('<b>')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "[bad](javascript:alert(1)) snake_case_name"
    )
    html = page.execute_async_script(
        "const done = arguments[1]; import('/playground/markdown.js').then(m => {"
        "const box = document.createElement('div'); box.append(...m.render(arguments[0])); done(box.innerHTML); })",
        source,
    )
    for part in (
        "<h3>Title</h3>",
        "<strong>bold</strong>",
        "<code>code</code>",
        "&lt;img",
        "<li>two<ul>",
        "<td>2</td>",
    ):
        assert part in html, html
    assert 'href="https://example.org/x"' in html and "<img" not in html
    assert 'href="javascript' not in html and "snake_case_name" in html and "print('&lt;b&gt;')" in html


def test_an_answer_is_stopped_by_escape(page: Any) -> None:
    settings(page, temperature=0, max_tokens=3000)
    say(page, PREFIX)
    shows(page, "#stop", lambda text: text == "Stop")
    shows(page, ".turn.assistant .text", lambda text: len(text) > 5)
    from selenium.webdriver.common.keys import Keys

    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    shows(page, ".facts", lambda text: text.endswith("stopped"))
    shows(page, "#running", lambda text: text == "0")
    assert find(page, "#send").is_displayed() and not find(page, "#stop").is_displayed()


def test_wrong_settings_are_told(page: Any) -> None:
    settings(page, temperature=-1)
    say(page, "Hello?")
    shows(page, ".turn.failed", lambda text: "temperature" in text)
    assert find(page, "#prompt").get_attribute("value") == "Hello?"
    settings(page, temperature=0, schema="{not json", max_tokens=4)
    find(page, "#prompt").send_keys("\n")
    shows(page, "#schema-problem", lambda text: "not JSON" in text)
    assert find(page, "#file").get_attribute("disabled")
    assert find(page, "#attach").get_attribute("title") == "This model takes no images"


def test_colours_follow_the_system_and_the_button(page: Any) -> None:
    def background() -> str:
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    light = background()
    find(page, "#theme").click()
    find(page, "#theme").click()
    assert find(page, "#theme").text == "dark" and background() != light
    find(page, "#theme").click()
    assert background() == light


def test_an_engine_that_is_gone_is_told_and_its_return_too(page: Any, server: Server) -> None:
    settings(page, temperature=0, max_tokens=3000)
    say(page, PREFIX)
    shows(page, ".turn.assistant .text", lambda text: len(text) > 5)
    os.kill(server.engine_pid(), signal.SIGKILL)
    shows(page, "#banner", lambda text: "The engine is not available" in text)
    assert find(page, "#status-text").text == "not available"
    shows(page, ".turn.failed", lambda text: "SIGKILL" in text)
    shows(page, "#status-text", lambda text: text == "ready", 120)
    assert not find(page, "#banner").is_displayed()


def test_a_server_that_is_gone_and_a_key_that_is_needed(tmp_path: Path) -> None:
    from door import served

    with chromium() as window:
        with served(config={"api_key": "secret"}) as found:
            window.get(found.url)
            shows(window, "#key-box", lambda text: "API key" in text)
            find(window, "#key").send_keys("secret\n")
            shows(window, "#status-text", lambda text: text == "ready")
            assert find(window, "#model").text == "tiny"
        shows(window, "#banner", lambda text: "does not answer" in text)
