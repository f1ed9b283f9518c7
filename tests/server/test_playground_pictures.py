"""Pictures on the page in a real browser: dropped, pasted, and answered by a tiny model that sees."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any

import pytest
from browser import chromium, why_not
from test_serve import Server
from vision_support import picture, png, seeing_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

# A file in a DataTransfer, given to an element as a drop or a paste gives it.
GIVE = """
const bytes = Uint8Array.from(atob(arguments[2]), (c) => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], "a.png", { type: "image/png" }));
const event = arguments[1] === "drop"
  ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
  : new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
document.querySelector(arguments[0]).dispatchEvent(event);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = seeing_checkpoint("qwen2_vl", tmp_path_factory.mktemp("model"))
    server = Server(model, "--dtype", "float32", "--max-total-tokens", "4096", "--served-model-name", "tiny")
    try:
        server.wait_ready()
        with chromium() as driver:
            driver.get(server.url)
            yield driver
    finally:
        server.close()


def wait_for(page: Any, selector: str, count: int) -> list[Any]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = page.find_elements("css selector", selector)
        if len(found) == count:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{selector}: {len(found)} elements, expected {count}")


def test_pictures_are_dropped_pasted_and_answered(page: Any) -> None:
    wait_for(page, "#attach[aria-disabled=false]", 1)
    page.execute_script(GIVE, "#compose", "drop", base64.b64encode(png(picture(1, 24, 16))).decode())
    wait_for(page, "#pictures img", 1)
    page.execute_script(GIVE, "#prompt", "paste", base64.b64encode(png(picture(2, 16, 24))).decode())
    wait_for(page, "#pictures img", 2)
    page.execute_script("document.getElementById('max_tokens').value = 4")
    page.find_element("css selector", "#prompt").send_keys("What are these?\n")
    wait_for(page, ".turn.user img", 2)
    wait_for(page, ".turn.assistant .facts", 1)
    assert not page.find_elements("css selector", ".turn.failed")
    assert not page.find_elements("css selector", "#pictures img")
