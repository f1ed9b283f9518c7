"""The first request of a new server: one question through its own door, shown with its speed and a line to copy."""

from __future__ import annotations

import asyncio
import json
from time import perf_counter
from typing import Any

from phloem.utils.say import say

QUESTION = "In one sentence, what does a plant's phloem do?"


async def greet(address: str, model: str, api_key: str | None) -> None:
    """Ask, print, and never fail: a server that cannot greet still serves."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 64,
        "temperature": 0,
    }
    start = perf_counter()
    try:
        answer = await asyncio.to_thread(_post, f"{address}/v1/chat/completions", body, api_key)
        seconds = perf_counter() - start
        count = answer["usage"]["completion_tokens"]
        text = answer["choices"][0]["message"]["content"].strip()
        say(f"\n> {QUESTION}\n{text}\n({count} tokens in {seconds:.2f} s, {count / seconds:.0f} tok/s)")
    except (OSError, KeyError, ValueError) as error:
        say(f"\nThe model gave no first answer: {error}")
    secret = " -H 'Authorization: Bearer YOUR_KEY'" if api_key else ""
    message = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    say(
        f"\nTry it:\n  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{secret} \\\n"
        f"    -d '{message}'\n\nCtrl-C stops the server.",
    )


def _post(url: str, body: dict[str, Any], api_key: str | None) -> Any:
    import urllib.error
    import urllib.request

    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise OSError(f"HTTP {error.code}: {error.read()[:300].decode(errors='replace')}") from None
