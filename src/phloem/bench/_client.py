"""A streaming client for OpenAI and native endpoints that times every event; and the run of a whole workload."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from phloem.bench._http import Answer, Http
from phloem.bench._workloads import Session, Workload


@dataclass
class Result:
    """One request as its client saw it. Times are `perf_counter` seconds."""

    start: float
    first: float = 0.0
    end: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    gaps: list[float] = field(default_factory=list)  # between events that brought text
    text: str = ""
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds per token behind the first."""
        return (self.end - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass
class Target:
    """Where requests go. `api` is `completions` or `generate`."""

    url: str
    model: str
    api: str = "completions"
    api_key: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, prompt: str, output_tokens: int, greedy: bool) -> tuple[str, dict[str, Any]]:
        temperature = 0.0 if greedy else 1.0
        if self.api == "generate":
            params = {"max_new_tokens": output_tokens, "temperature": temperature, "ignore_eos": True}
            return "/generate", {"text": prompt, "sampling_params": params, "stream": True, **self.extra}
        return "/v1/completions", {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


def _absorb(result: Result, event: dict[str, Any]) -> bool:
    """Take one event; True if it brought text."""
    if "error" in event:
        result.error = str(event["error"])
        return False
    if "meta_info" in event:
        meta = event["meta_info"]
        result.input_tokens, result.output_tokens = meta["prompt_tokens"], meta["completion_tokens"]
        result.cached_tokens = meta.get("cached_tokens") or 0
        grown = len(event["text"]) > len(result.text)
        result.text = event["text"]
        return grown
    usage = event.get("usage")
    if usage:
        result.input_tokens, result.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        result.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    choices = event.get("choices") or []
    text = choices[0].get("text") if choices else None
    result.text += text or ""
    return bool(text)


class Client:
    """Requests to a target; `fresh` opens a connection per request.

    Some servers close a connection after a few requests or seconds: one that is used again at that moment fails.
    While an answer arrives, only its bytes and their times are kept (see `_http.py`): events are read when it is there.
    """

    def __init__(self, target: Target, fresh: bool = False) -> None:
        self.target = target
        headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        self._http = Http(target.url, headers, fresh)

    async def close(self) -> None:
        self._http.close()

    async def get(self, path: str) -> Any:
        answer = await self._http.exchange("GET", path)
        return json.loads(answer.body) if answer.status == 200 else None

    async def post(self, path: str) -> int:
        return (await self._http.exchange("POST", path)).status

    async def ask(self, prompt: str, output_tokens: int, greedy: bool) -> Result:
        """Send one request and read its stream to the end. Never raises: a failure is a result with an error."""
        path, body = self.target.body(prompt, output_tokens, greedy)
        result = Result(start=perf_counter())
        try:
            answer = await self._http.exchange("POST", path, body)
            if answer.status != 200:
                result.error = f"HTTP {answer.status}: {answer.body.decode(errors='replace')[:300]}"
            else:
                _read(result, answer)
        except (
            OSError,
            ValueError,
            KeyError,
        ) as error:  # a broken connection, no HTTP or JSON, a field that is missing
            result.error = f"{type(error).__name__}: {error}"
        result.end = result.end or perf_counter()
        result.first = result.first or result.end
        return result


def _read(result: Result, answer: Answer) -> None:
    """Take the events of an answer, each as of the time when it was complete."""
    for now, line in answer.lines():
        if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
            continue
        if _absorb(result, json.loads(line[5:])):
            if result.end:
                result.gaps.append(now - result.end)
            else:
                result.first = now
            result.end = now


async def run_workload(client: Client, load: Workload, tick: Callable[[Result], None]) -> tuple[list[Result], float]:
    """Every session to its end; gives the results and how long the whole took. `tick` is told of each result."""
    gate = asyncio.Semaphore(load.concurrency)
    results: list[Result] = []
    clock = random.Random(0)

    async def one(session: Session) -> None:
        async with gate:
            said = ""
            for turn in session.turns:
                said += turn.text
                result = await client.ask(said, turn.output_tokens, load.greedy)
                results.append(result)
                tick(result)
                said += result.text

    start = perf_counter()
    tasks: list[asyncio.Task[None]] = []
    for session in load.sessions:
        tasks.append(asyncio.create_task(one(session)))
        if load.rate:
            await asyncio.sleep(clock.expovariate(load.rate))
    await asyncio.gather(*tasks)
    return results, perf_counter() - start
