"""Conversations whose roles a chat template may not know or wants first: the shapes that they are tried in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_INSTRUCTIONS = ("system", "developer")


def shapes(messages: list[dict[str, Any]], source: str) -> Iterator[list[dict[str, Any]]]:
    """As sent; then with developers called system; then with all instructions as one system message in front.

    A template (`source`) that never says "developer" was trained on no such role: it is called system at once, and
    stands as it was sent only where nothing else does.
    """
    named = any(message.get("role") == "developer" for message in messages)
    unknown = named and "developer" not in source
    if not unknown:
        yield messages
    if all(message.get("role") not in _INSTRUCTIONS for message in messages[1:]) and (
        not messages or messages[0].get("role") != "developer"
    ):
        return
    renamed = [{**message, "role": "system"} if message.get("role") == "developer" else message for message in messages]
    if renamed != messages:
        yield renamed
    said = [message for message in renamed if message.get("role") == "system"]
    text = "\n\n".join(part for message in said for part in _texts(message.get("content")))
    rest = [message for message in renamed if message.get("role") != "system"]
    if rest:
        yield [{"role": "system", "content": text}, *rest]
    if unknown:
        yield messages


def shows_instructions(messages: list[dict[str, Any]], prompt: str) -> bool:
    """Whether the prompt has what the instructions say: some templates leave out roles that they do not know."""
    said = [message for message in messages if message.get("role") in _INSTRUCTIONS]
    return all(text in prompt for message in said for text in _texts(message.get("content")))


def _texts(content: Any) -> list[str]:
    """The texts of a message's parts, as far as they say anything."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]
