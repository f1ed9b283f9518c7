"""A door over a fake engine, for the tests of the HTTP side."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

from phloem.client.client import EngineClient
from phloem.client.info import ModelInfo
from phloem.core.config import Config
from phloem.core.messages import unpack_ids
from phloem.server.app import create_app
from phloem.server.serve import run, serve
from phloem.testing.byte_tokenizer import ByteTemplate, ByteTokenizer
from phloem.testing.fake_engine import FakeEngine

CONTEXT = 512
MODEL = "tiny"


def make_info(**changes: Any) -> ModelInfo:
    values: dict[str, Any] = {
        "model_path": "/models/tiny",
        "served_model_name": MODEL,
        "vocab_size": ByteTokenizer.vocab_size,
        "context_length": CONTEXT,
        "tokenizer_path": "/models/tiny",
        "eos_ids": ByteTokenizer.eos_ids,
        "model_type": "llama",
        "architectures": ("LlamaForCausalLM",),
    }
    return ModelInfo(**{**values, **changes})


class Marked(ByteTokenizer):
    """The byte tokenizer with other names for some of its special tokens: name -> the token's own."""

    def __init__(self, marks: dict[str, str]) -> None:
        self.marks = marks

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        for mark, name in self.marks.items():
            text = text.replace(mark, name)
        return super().encode(text, add_special_tokens)


THINKS = Marked({"<think>": "<user>", "</think>": "<system>"})  # for tests without a chat template


@dataclass
class Door:
    engine: FakeEngine
    client: EngineClient
    app: FastAPI
    http: httpx.AsyncClient

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **options)

    async def events(self, path: str, body: dict[str, Any]) -> list[str]:
        """The data of every event of a stream."""
        response = await self.http.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = response.text.split("\n\n")
        assert blocks[-1] == ""
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
        return [block.removeprefix("data: ") for block in blocks[:-1]]


@contextlib.asynccontextmanager
async def open_door(
    engine: FakeEngine | None = None,
    info: ModelInfo | None = None,
    tokenizer: ByteTokenizer | None = None,
    **config: Any,
) -> AsyncIterator[Door]:
    """An app in this process, reached without a socket."""
    engine = engine if engine is not None else FakeEngine()
    info = info if info is not None else make_info()
    client = EngineClient(tokenizer or ByteTokenizer(), ByteTemplate(), info)  # type: ignore[arg-type]
    client.attach(engine)
    client.start()
    app = create_app(client, Config.from_flat(config), info)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as http:
        if engine.ready:
            await client.wait_ready()
        yield Door(engine, client, app, http)
    await client.close()


@dataclass
class Served:
    url: str
    engine: FakeEngine
    client: EngineClient
    loop: asyncio.AbstractEventLoop
    end: asyncio.Event

    def prompt(self) -> str:
        """What the last request asked the model."""
        ids = unpack_ids(self.engine.submits[-1].input_ids).tolist()
        return ByteTokenizer().decode(ids, skip_special_tokens=False)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.end.set)

    def call(self, function: Any, *args: Any) -> Any:
        """Run a function in the server's thread, between its events."""

        async def inside() -> Any:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(inside(), self.loop).result(5)


@contextlib.contextmanager
def served(info: ModelInfo | None = None, config: dict[str, Any] | None = None, **engine: Any) -> Iterator[Served]:
    """A real server on a free port, in a thread."""
    started = threading.Event()
    box: dict[str, Any] = {}

    async def main() -> None:
        settings = Config.from_flat({"port": 0, "drain_timeout": 0.5, **(config or {})})
        about = info if info is not None else make_info()
        link = FakeEngine(**engine)
        client = EngineClient(ByteTokenizer(), ByteTemplate(), about)  # type: ignore[arg-type]
        client.attach(link)
        client.start()
        stop = asyncio.Event()

        def ready(host: str, port: int) -> None:
            box.update(
                url=f"http://{host}:{port}", stop=stop, loop=asyncio.get_running_loop(), engine=link, client=client
            )
            started.set()

        await serve(create_app(client, settings, about), "127.0.0.1", 0, ready, stop)
        await client.close()

    thread = threading.Thread(target=run, args=(main,), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield Served(box["url"], box["engine"], box["client"], box["loop"], box["stop"])
    finally:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(10)
        assert not thread.is_alive()


def on_loop(test: Any) -> Any:
    """Run an async test function to its end."""

    @functools.wraps(test)
    def run_it(*args: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **named), 20))

    return run_it


async def until(condition: Any, seconds: float = 5.0) -> None:
    """Wait until a condition holds."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "the condition never held"
        await asyncio.sleep(0.005)


async def die_at(engine: FakeEngine, step: int, reason: str) -> None:
    """The engine dies in the middle of its work, however slow the machine is."""
    await until(lambda: engine.step >= step)
    engine.die(reason)
