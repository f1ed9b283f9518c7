"""Anthropic's messages API. It can continue a turn that has begun."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from phloem.core.errors import BadRequest, PhloemError
from phloem.lang.backends._base import Answer, Backend, Meta, Prompt
from phloem.lang.chat import FORMATS, ChatFormat
from phloem.lang.ir import Sampling

_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
_DATA_URL = re.compile(r"data:(?P<kind>[^;]+);base64,(?P<data>.*)", re.DOTALL)


class Anthropic(Backend):
    """Claude models. `options` are keywords of the client of the `anthropic` package (`api_key`, `base_url`, ...)."""

    chat_only = True

    def __init__(self, model_name: str, **options: Any) -> None:
        try:
            import anthropic  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise PhloemError("this backend needs the anthropic package: pip install anthropic") from None
        self._failures: tuple[type[Exception], ...] = (anthropic.AnthropicError,)
        self._client: Any = anthropic.Anthropic(**options)
        self.model_name = model_name

    @property
    def format(self) -> ChatFormat:
        return FORMATS["default"]

    def get_model_name(self) -> str:
        return self.model_name

    def shutdown(self) -> None:
        self._client.close()

    def _fields(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        if prompt.role != "assistant":
            raise BadRequest("a chat model writes only in the assistant's turn: put gen into assistant(...)")
        given = sampling.given()
        messages = [_message(message) for message in prompt.messages]
        system = "\n\n".join(_plain(message) for message in prompt.messages if message["role"] == "system")
        messages = [message for message in messages if message["role"] != "system"]
        if prompt.partial.strip():
            messages.append({"role": "assistant", "content": prompt.partial.rstrip()})
        fields: dict[str, Any] = {"model": self.model_name, "messages": messages}
        if system:
            fields["system"] = system
        fields["max_tokens"] = given.pop("max_new_tokens", 128)
        # Not every model takes these any more, so what asks for nothing is left out.
        chosen = {name: given.pop(name) for name in _DEFAULTS if name in given}
        fields["extra_body"] = {name: value for name, value in chosen.items() if value != _DEFAULTS[name]}
        # This API takes a list of stops, none of them blank.
        stops = [stop for stop in sampling.stops() if stop.strip()]
        if len(stops) < len(sampling.stops()):
            raise BadRequest("Anthropic's API takes no stop string of blanks alone", param="stop")
        given.pop("stop", None)
        if stops:
            fields["stop_sequences"] = stops
        if given:
            raise BadRequest(f"Anthropic's API has no {', '.join(given)}", param=next(iter(given)))
        return fields

    def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        fields = self._fields(prompt, sampling)
        try:
            answer = self._client.messages.create(**fields)
        except self._failures as error:
            raise PhloemError(f"{type(error).__name__}: {error}") from error
        text = "".join(part.text for part in answer.content if part.type == "text")
        return text, _meta(answer)

    def generate_stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[tuple[str, Meta]]:
        fields = self._fields(prompt, sampling)
        try:
            with self._client.messages.stream(**fields) as stream:
                for text in stream.text_stream:
                    yield text, {}
                yield "", _meta(stream.get_final_message())
        except self._failures as error:
            raise PhloemError(f"{type(error).__name__}: {error}") from error


def _meta(answer: Any) -> Meta:
    usage = answer.usage
    return {
        "id": answer.id,
        "finish_reason": {"type": answer.stop_reason, "matched": answer.stop_sequence},
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "cached_tokens": getattr(usage, "cache_read_input_tokens", None) or 0,
    }


def _plain(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A turn in OpenAI's shape as one of Anthropic's."""
    content = message["content"]
    if isinstance(content, str):
        return message
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text":
            parts.append(part)
        elif part["type"] == "image_url":
            url = part["image_url"]["url"]
            found = _DATA_URL.match(url)
            source = (
                {"type": "base64", "media_type": found["kind"], "data": found["data"]}
                if found
                else {"type": "url", "url": url}
            )
            parts.append({"type": "image", "source": source})
        else:
            raise BadRequest("Anthropic's API takes no videos")
    return {**message, "content": parts}


BACKEND = Anthropic
