"""Pictures in request bodies: what a client may write where one belongs."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, cast

from phloem.core.errors import BadRequest
from phloem.multimodal._reader import Source

if TYPE_CHECKING:
    from phloem.multimodal._reader import PictureReader
    from phloem.text.template import ChatTemplate

PICTURES = ("image_url", "image", "input_image")  # types of parts of a message


def source_of(value: Any, where: str) -> Source:
    """One picture: an address, a data URI, base64, a path; the same as `url` of an object; or, from Python, its bytes
    or a Pillow image.

    Raises:
        BadRequest: it is none of these.
    """
    if isinstance(value, Source):
        return value
    if isinstance(value, dict):
        found = cast("dict[str, Any]", value)
        inner = found.get("url") or found.get("image_url") or found.get("image") or found.get("data")
        if inner is not None and not isinstance(inner, dict):
            return source_of(inner, f"{where}.url" if found.get("url") else where)
    if isinstance(value, str) and value:
        return Source(value, where)
    if isinstance(value, bytes | bytearray | memoryview):
        return Source("", where, bytes(value))
    if type(value).__module__.startswith("PIL."):
        value = cast("Any", value)
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
        return Source(found["data"], f"{where}.source.data", plain=True)
    if kind == "url" and isinstance(found.get("url"), str):
        return Source(found["url"], f"{where}.source.url")
    raise BadRequest(f"{where}.source: expected base64 with data, or url with an url", param=f"{where}.source")


def seen(
    messages: list[dict[str, Any]], reader: PictureReader | None, template: ChatTemplate | None
) -> tuple[list[dict[str, Any]], list[Source]]:
    """A conversation with places for its pictures as the template writes them, and the pictures in order.

    Raises:
        BadRequest: the model takes none, or a part is neither text nor a picture.
    """
    pictures: list[Source] = []
    found: list[dict[str, Any]] = []
    for at, message in enumerate(messages):
        content: Any = message.get("content")
        if not isinstance(content, list) or all(_kind(part) not in PICTURES for part in cast("list[Any]", content)):
            found.append(message)
            continue
        parts = [
            _part(part, f"messages[{at}].content[{number}]") for number, part in enumerate(cast("list[Any]", content))
        ]
        own = [part for part in parts if isinstance(part, Source)]
        if reader is None:
            raise BadRequest("this model takes no pictures", param=own[0].where, code="not_supported")
        pictures += own
        shown: Any = [{"type": "image"} if isinstance(part, Source) else part for part in parts]
        if template is None or not template.shows_pictures:
            inline = reader.processor.inline
            shown = "\n".join(inline if isinstance(part, Source) else part["text"] for part in parts)
        found.append({**message, "content": shown})
    return found, pictures


def _kind(part: Any) -> Any:
    return cast("dict[str, Any]", part).get("type") if isinstance(part, dict) else None


def _part(part: Any, where: str) -> dict[str, Any] | Source:
    kind = _kind(part)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadRequest(f"{where}: text is missing", param=where)
        return {"type": "text", "text": part["text"]}
    if kind not in PICTURES:
        raise BadRequest(f"not supported yet: {where} of type {kind!r:.100}", param=where, code="not_supported")
    name = "image_url" if part.get("image_url") is not None else "image"
    if part.get(name) is None:
        raise BadRequest(f"{where}: {kind} is missing", param=where)
    return source_of(part[name], f"{where}.{name}")
