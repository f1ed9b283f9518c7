"""The page of a model that draws, in a real browser: previews, a gallery, what is refused, what is stopped; films."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import chromium, why_not
from served_pictures import serving

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

from phloem.testing.films import tiny_films

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "model"
# Notes every caption that a picture has had.
NOTE = """
window.captions = [];
new MutationObserver(() => {
  for (const one of document.querySelectorAll(".drawn.growing figcaption")) {
    if (one.parentElement.querySelector("img")) window.captions.push(one.textContent);
  }
}).observe(document.getElementById("gallery"), { childList: true, subtree: true, characterData: true });
"""

# Answers of jobs that are asked for come a second late.
SLOW = """
const real = window.fetch;
window.asked = 0;
window.fetch = async (path, options) => {
  const answer = await real(path, options);
  if (options?.method === "POST") {
    await new Promise((wake) => { setTimeout(wake, 1000); });
    window.asked += 1;
  }
  return answer;
};
"""


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with serving(DIGITS, "--image-defaults", '{"guidance_scale": 3}') as url, chromium() as driver:
        driver.get(url)
        yield driver


def wait_for(page: Any, selector: str, count: int, seconds: float = 60) -> list[Any]:
    found: list[Any] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = page.find_elements("css selector", selector)
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{selector}: {len(found)} elements, expected {count}")


def ask(page: Any, prompt: str, **fields: object) -> None:
    for name in ("width", "height", "draw-seed", "steps", "count"):
        value = fields.get(name.removeprefix("draw-"), "")
        page.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, str(value))
    page.execute_script("document.getElementById('draw-prompt').value = ''")
    page.find_element("css selector", "#draw-prompt").send_keys(prompt + "\n")


def wait_for_jobs(url: str, wanted: list[str], seconds: float = 20) -> None:
    end, found = time.monotonic() + seconds, list[str]()
    while time.monotonic() < end:
        found = [job["status"] for job in httpx.get(f"{url}/v1/videos").json()["data"]]
        if found == wanted:
            return
        time.sleep(0.1)
    raise AssertionError(found)


def sources(page: Any) -> list[str]:
    return [one.get_attribute("src") for one in page.find_elements("css selector", ".drawn:not(.growing) img")]


def test_pictures_are_previewed_kept_refused_and_stopped(page: Any) -> None:
    wait_for(page, "#drawing:not([hidden])", 1)
    assert not page.find_element("css selector", "#chat").is_displayed()
    assert page.find_element("css selector", "#drawing-title").text == "Pictures"
    page.execute_script(NOTE)

    ask(page, "draw a seven", seed=3, steps=12)
    wait_for(page, ".drawn:not(.growing) img", 1)
    captions = page.execute_script("return window.captions")
    assert {"preview 1", "preview 2", "preview 3"} <= set(captions), captions
    caption = page.find_element("css selector", ".drawn figcaption").text
    assert "draw a seven" in caption and "seed 3" in caption and "16x16" in caption
    assert page.find_element("css selector", ".drawn a").get_attribute("download") == "phloem-3.png"

    ask(page, "draw a one", steps=4, count=2, seed=7)
    wait_for(page, ".drawn:not(.growing) img", 3)
    assert page.find_element("css selector", "#drawn").text == "3 in this tab"
    first = sources(page)[-1]
    page.find_elements("css selector", ".drawn button")[-1].click()  # the seven's seed again
    page.execute_script("document.getElementById('steps').value = 12; document.getElementById('count').value = ''")
    page.find_element("css selector", "#draw-send").click()
    wait_for(page, ".drawn:not(.growing) img", 4)
    assert sources(page)[0] == first

    ask(page, "draw a two", steps=2000)
    (problem,) = wait_for(page, "#gallery .problem", 1)
    assert "num_inference_steps" in problem.text
    ask(page, "draw a two", width=15, height=16)
    wait_for(page, "#gallery .problem", 2)
    assert "multiples" in page.find_element("css selector", "#gallery .problem").text
    ask(page, "draw a two", count=10**9)  # and no place is made for each
    wait_for(page, "#gallery .problem", 3)
    assert page.find_element("css selector", "#gallery .problem").text.startswith("n:")

    ask(page, "draw a two", steps=1000)
    wait_for(page, ".drawn.growing", 1)
    page.find_element("css selector", "#draw-stop").click()
    wait_for(page, ".drawn.growing", 0)
    assert len(sources(page)) == 4
    page.find_element("css selector", "#gallery-clear").click()
    wait_for(page, "#gallery figure, #gallery .problem", 0)
    assert page.find_element("css selector", "#gallery-empty").is_displayed()
    assert page.find_element("css selector", "#pixels").is_displayed()
    assert not page.find_element("css selector", "#tree-title").is_displayed()
    assert not [entry for entry in page.get_log("browser") if "Content Security" in entry["message"]]


def test_films_are_asked_for_looked_after_and_shown(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="films need PyAV: pip install 'phloem[media]'")
    folder = tiny_films(tmp_path / "model", "hunyuan_video")
    defaults = '{"size": "32x16", "frames": 5, "steps": 3}'
    with serving(folder, "--image-defaults", defaults) as url, chromium() as driver:
        driver.get(url)
        wait_for(driver, "#drawing:not([hidden])", 1)
        ask(driver, "draw a red cat", seed=3)
        (video,) = wait_for(driver, ".drawn:not(.growing) video", 1)
        assert video.get_attribute("src").startswith("blob:")
        assert "seed 3" in driver.find_element("css selector", ".drawn figcaption").text
        ask(driver, "draw a red cat", steps=1000)
        wait_for(driver, ".drawn.growing", 1)
        time.sleep(0.5)  # its job is there
        driver.find_element("css selector", "#draw-stop").click()
        wait_for(driver, ".drawn.growing", 0)
        wait_for_jobs(url, ["completed"])

        driver.execute_script(SLOW)
        ask(driver, "draw a red cat", steps=1000)
        wait_for(driver, ".drawn.growing", 1)
        driver.find_element("css selector", "#draw-stop").click()  # before its job is there
        wait_for(driver, ".drawn.growing", 0)
        assert driver.execute_script("return window.asked") == 1
        wait_for_jobs(url, ["completed"])
        driver.find_element("css selector", "#gallery-clear").click()
        wait_for(driver, "#gallery figure", 0)
        assert not [entry for entry in driver.get_log("browser") if "Content Security" in entry["message"]]
