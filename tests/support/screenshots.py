"""Take the pictures of the page for the documentation: python tests/screenshots.py URL docs/images"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import httpx
from browser import chromium

QUESTION = "How do I look after a houseplant? Answer with a Markdown list of four tips, each with a bold title."
SHARED = "You are a gardener who answers in one short sentence. "
QUESTIONS = [
    "Which tree grows fastest?",
    "Which tree lives longest?",
    "How often are roses cut?",
    "When are tulips planted?",
    "When are tulips in flower?",
    "What do bees like?",
]


def ask(url: str, question: str, count: int = 60) -> None:
    body = {
        "model": "default",
        "messages": [{"role": "system", "content": SHARED * 3}, {"role": "user", "content": question}],
        "max_tokens": count,
        "temperature": 0,
    }
    if count > 100:
        body["ignore_eos"] = True
    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)


def main(url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    httpx.post(f"{url}/flush_cache")
    for question in QUESTIONS[:4]:
        ask(url, question)
    for dark in (False, True):
        with chromium(1440, 900, dark) as page:
            page.get(url)
            for name, value in (("temperature", 0), ("repetition_penalty", 1.1), ("max_tokens", 200)):
                page.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)
            page.find_element("css selector", "#prompt").send_keys(QUESTION + "\n")
            while not page.find_elements("css selector", ".facts"):
                time.sleep(0.2)
            page.find_element("css selector", "#prompt").send_keys("Which of these matters most, and why?\n")
            for question in QUESTIONS[3:]:
                threading.Thread(target=ask, args=(url, question, 400), daemon=True).start()
            time.sleep(2.5)
            page.save_screenshot(str(folder / f"page-{'dark' if dark else 'light'}.png"))
            page.find_element("css selector", "#fresh").click()
            time.sleep(1)
    with chromium(430, 900) as page:
        page.get(url)
        time.sleep(3)
        page.save_screenshot(str(folder / "page-narrow.png"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
