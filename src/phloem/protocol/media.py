"""Pictures in request bodies: what a client may write where one belongs."""

from __future__ import annotations

import base64
import io
from typing import Any, cast

from phloem.core.errors import BadRequest
from phloem.multimodal._reader import Source


def source_of(value: Any, where: str) -> Source:
    """One picture: an address, a data URI, base64, a path; the same as `url` of an object; or, from Python, its bytes
    or a Pillow image.

    Raises:
        BadRequest: it is none of these.
    """
    if isinstance(value, dict):
        found = cast("dict[str, Any]", value)
        inner = found.get("url") or found.get("image_url") or found.get("image") or found.get("data")
        if inner is not None and not isinstance(inner, dict):
            return source_of(inner, f"{where}.url" if found.get("url") else where)
    if isinstance(value, str) and value:
        return Source(value, where)
    if isinstance(value, bytes | bytearray | memoryview):
        return Source("", where, bytes(value))
    if callable(getattr(value, "save", None)):  # a Pillow image
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return Source("", where, buffer.getvalue())
    raise BadRequest(f"{where}: expected an address, a data URI or base64", param=where)


def several(value: Any, where: str) -> list[Source]:
    """None, one picture or a list of them."""
    if value is None or (isinstance(value, str) and not value):
        return []
    if isinstance(value, list | tuple):
        items = cast("list[Any]", list(value))
        return [source_of(item, f"{where}[{number}]") for number, item in enumerate(items)]
    return [source_of(value, where)]


def of_prompts(value: Any, where: str, count: int, batch: bool) -> list[list[Source]]:
    """`image_data` of `/generate`: one picture or a list; of several prompts a list with an entry for each.

    Raises:
        BadRequest: there are not as many entries as prompts.
    """
    if not batch:
        return [several(value, where)]
    if value is None or value in ("", []):
        return [[] for _ in range(count)]
    if not isinstance(value, list | tuple):
        return [several(value, where) for _ in range(count)]
    items = cast("list[Any]", list(value))
    if len(items) != count:
        raise BadRequest(f"{where} has {len(items)} entries for {count} prompts", param=where)
    return [several(item, f"{where}[{number}]") for number, item in enumerate(items)]


def block_source(block: dict[str, Any], where: str) -> Source:
    """The picture of one of Anthropic's image blocks. Raises BadRequest."""
    source: Any = block.get("source")
    found = cast("dict[str, Any]", source) if isinstance(source, dict) else {}
    kind = found.get("type")
    if kind == "base64" and isinstance(found.get("data"), str):
        return Source(found["data"], f"{where}.source.data")
    if kind == "url" and isinstance(found.get("url"), str):
        return Source(found["url"], f"{where}.source.url")
    raise BadRequest(f"{where}.source: expected base64 with data, or url with an url", param=f"{where}.source")


def as_data_uri(source: Source) -> str:
    """For messages that are handed on as text."""
    if source.data is None:
        return source.text
    return "data:image/png;base64," + base64.b64encode(source.data).decode()
