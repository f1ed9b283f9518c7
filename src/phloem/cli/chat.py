"""Talk to a model in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import phloem
from phloem.cli._options import media_parts, parse
from phloem.core.config import opt
from phloem.core.errors import PhloemError

DESCRIPTION = (
    "Talk to a model. Answers stream; Ctrl-C stops one, Ctrl-D or /exit leaves, /clear begins anew. "
    "With --url it talks to a running server of any OpenAI-compatible kind."
)
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    url: str | None = opt(None, "Server to talk to; default: load the model here.")
    system: str | None = opt(None, "System prompt.")
    max_new_tokens: int = opt(512, "Most tokens of an answer.")
    temperature: float = opt(0.7, "0 takes the most likely token.")
    top_p: float = opt(0.95, "Nucleus sampling.")
    key: str | None = opt(None, "Bearer token for --url.")
    image: tuple[str, ...] = opt((), "Pictures that the first question is about: files or addresses.")
    video: tuple[str, ...] = opt((), "Videos that the first question is about: files or addresses.")


def main(argv: list[str]) -> int:
    config, options = parse("chat", argv, Options, skip=("server",), description=DESCRIPTION)
    if options.url:
        return _talk(_Remote(options, config.model.model_path), options)
    print("loading the model ...", file=sys.stderr)
    settings = {**config.flat(), "log_level": "warning"}
    with phloem.Engine(**settings) as engine:
        return _talk(_Local(engine, options), options)


class _Local:
    def __init__(self, engine: Any, options: Options) -> None:
        self._engine = engine
        self._options = options

    def answer(self, messages: Messages) -> Iterator[str]:
        ids = self._engine.encode_chat(messages)
        params = {
            "max_new_tokens": self._options.max_new_tokens,
            "temperature": self._options.temperature,
            "top_p": self._options.top_p,
        }
        shown = 0
        pictures = self._engine.pictures_of(messages) or None
        for event in self._engine.generate(input_ids=ids, sampling_params=params, image_data=pictures, stream=True):
            yield event["text"][shown:]
            shown = len(event["text"])


class _Remote:
    def __init__(self, options: Options, model: str) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
        self._http = httpx.Client(base_url=(options.url or "").rstrip("/"), headers=headers, timeout=600)
        self._options = options
        self._failures = (httpx.HTTPError, ValueError, KeyError, IndexError)
        # A server knows its model's name; one that lists none is asked for the name given here.
        listed = self._listed()
        self._model = listed[0] if listed and model == "demo" else model

    def _listed(self) -> list[str]:
        try:
            return [item["id"] for item in self._http.get("/v1/models").raise_for_status().json()["data"]]
        except self._failures as error:
            raise PhloemError(f"{self._options.url} does not answer as a server does: {error}") from None

    def answer(self, messages: Messages) -> Iterator[str]:
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": self._options.max_new_tokens,
            "temperature": self._options.temperature,
            "top_p": self._options.top_p,
            "stream": True,
        }
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise PhloemError(f"HTTP {response.status_code}: {response.read()[:300].decode(errors='replace')}")
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            raise PhloemError(str(event["error"].get("message", event["error"])))
                        for choice in event.get("choices", []):
                            yield choice["delta"].get("content") or ""
        except self._failures as error:
            raise PhloemError(f"the connection failed: {error}") from None


def _talk(model: _Local | _Remote, options: Options) -> int:
    opening: Messages = [{"role": "system", "content": options.system}] if options.system else []
    messages, media = list(opening), media_parts(options.image, options.video)
    while True:
        try:
            said = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if said in ("/exit", "/quit"):
            return 0
        if said == "/clear":
            messages, media = list(opening), media_parts(options.image, options.video)
            print("(a new conversation)")
        elif said:
            parts = [*media, {"type": "text", "text": said}]
            messages.append({"role": "user", "content": parts if media else said})
            media = []
            messages.append({"role": "assistant", "content": _say(model, messages)})


def _say(model: _Local | _Remote, messages: Messages) -> str:
    """Print an answer as it comes; Ctrl-C keeps what has come."""
    parts: list[str] = []
    start = perf_counter()
    stream = iter(model.answer(messages))
    try:
        for part in stream:
            parts.append(part)
            print(part, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    except PhloemError as error:
        print(f"\n({error.message})", end="")
    print(f"\n({perf_counter() - start:.1f} s)")
    return "".join(parts)
