"""Forms with files (`multipart/form-data`, RFC 7578), out of a body that has been read whole."""

from __future__ import annotations

import re
from typing import Any

from phloem.core.errors import BadRequest

MOST_PARTS = 128
MOST_HEADER = 4096  # bytes of a part's header
MOST_TEXT = 1 << 20  # bytes of a field that is no file
_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(r';\s*name=(?:"((?:[^"\\]|\\.)*)"|([^\s;]+))', re.IGNORECASE)


_INSIDE = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")


def form_of(
    body: bytes,
    content_type: str,
    files: frozenset[str],
    lists: frozenset[str],
    objects: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The fields of a form by name: text, or of `files` bytes. Those of `lists` may come several times, with or without
    `[]` behind the name. The fields of `objects` are named `object[field]`.

    Raises:
        BadRequest: the body is no such form, a field comes twice, or text is no UTF-8; it names the field.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise BadRequest(
            f"expected a form (multipart/form-data) with a file, got {kind or 'no content type'!r:.100}",
            code="invalid_form",
        )
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise BadRequest("the form's content type names no boundary", code="invalid_form")
    mark = b"--" + (found[1] or found[2]).encode("latin-1", "replace")
    values: dict[str, Any] = {}
    for name, data in _parts(body, mark):
        base, inside = name.removesuffix("[]"), _INSIDE.fullmatch(name)
        if inside is not None and inside[1] in objects:
            whole = values.setdefault(inside[1], {})
            if not isinstance(whole, dict) or inside[2] in whole:
                raise BadRequest(f"{name:.100}: the form has this field twice", param=name[:100])
            whole[inside[2]] = _text(data, name)
        elif base in lists:
            values.setdefault(base, []).append(data if base in files else _text(data, name))
        elif name in values:
            raise BadRequest(f"{name:.100}: the form has this field twice", param=name[:100])
        else:
            values[name] = data if name in files else _text(data, name)
    # An empty field is one that was left blank; an empty file is for whoever reads it.
    return {name: value for name, value in values.items() if value != ""}


def _parts(body: bytes, mark: bytes) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    at = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    if at == 1:
        raise BadRequest("the form's boundary does not occur in its body", code="invalid_form")
    while True:
        at += len(mark)
        if body.startswith(b"--", at):
            return found
        line = body.find(b"\r\n", at)
        head = body.find(b"\r\n\r\n", line) if line >= 0 else -1
        end = body.find(b"\r\n" + mark, head + 2) if head >= 0 else -1
        if end < 0:
            raise BadRequest("the form ends inside a field", code="invalid_form")
        if head - line > MOST_HEADER or len(found) >= MOST_PARTS:
            raise BadRequest(f"a form has at most {MOST_PARTS} fields, with short headers", code="invalid_form")
        found.append((_name(body[line + 2 : head]), body[head + 4 : end]))
        at = end + 2


def _name(header: bytes) -> str:
    for line in header.decode("utf-8", "replace").split("\r\n"):
        key, _, value = line.partition(":")
        match = _NAME.search(value) if key.strip().lower() == "content-disposition" else None
        if match is not None:
            return match[1] if match[1] is not None else match[2]
    raise BadRequest("a field of the form has no name", code="invalid_form")


def _text(data: bytes, name: str) -> str:
    if len(data) > MOST_TEXT:
        raise BadRequest(f"{name:.100}: over {MOST_TEXT} bytes of text", param=name[:100])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"{name:.100}: not valid UTF-8", param=name[:100]) from None
