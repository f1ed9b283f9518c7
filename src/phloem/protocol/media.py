"""Pictures, videos, documents and sounds in request bodies: what a client may write where one belongs."""

from __future__ import annotations

import io
import mimetypes
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from phloem.core.errors import BadRequest
from phloem.multimodal._places import NAMES
from phloem.multimodal._processed import FORMAT, Tensors
from phloem.multimodal._reader import Source
from phloem.multimodal._video import MOST_FRAMES, Wanted

if TYPE_CHECKING:
    from phloem.multimodal._reader import MediaReader
    from phloem.text.template import ChatTemplate

# Types of parts of a message, and what they are.
MEDIA = {
    "image_url": "image",
    "image": "image",
    "input_image": "image",
    "video_url": "video",
    "video": "video",
    "audio_url": "audio",
    "audio": "audio",
    "input_audio": "audio",
    "file": "document",
    "input_file": "document",
    "document": "document",
}
_MOST_FPS = 120.0


def source_of(value: Any, where: str, kind: str = "image") -> Source:
    """One picture, video or sound: an address, a data URI, base64, a path; the same as `url` of an object; or, from
    Python, its bytes or a Pillow image. An object of a video may say `num_frames` or `fps`.

    Raises:
        BadRequest: it is none of these.
    """
    if isinstance(value, Source):
        return value
    if isinstance(value, dict):
        found = cast("dict[str, Any]", value)
        inner = next((found[name] for name in ("url", f"{kind}_url", kind, "data", "path") if found.get(name)), None)
        if inner is not None and not isinstance(inner, dict):
            source = source_of(inner, f"{where}.url" if found.get("url") else where, kind)
            return replace(source, wanted=_wanted(found, where)) if kind == "video" else source
    if isinstance(value, str) and value:
        return Source(value, where, kind=kind)
    if isinstance(value, bytes | bytearray | memoryview):
        return Source("", where, bytes(value), kind=kind)
    if kind == "image" and type(value).__module__.startswith("PIL."):
        value = cast("Any", value)
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return Source("", where, buffer.getvalue())
    raise BadRequest(f"{where}: expected an address, a data URI or base64", param=where)


def _wanted(video: dict[str, Any], where: str) -> Wanted:
    frames, fps = video.get("num_frames"), video.get("fps")
    if frames is not None and (
        not isinstance(frames, int) or isinstance(frames, bool) or not 1 <= frames <= MOST_FRAMES
    ):
        message = f"{where}.num_frames must be a number from 1 to {MOST_FRAMES}"
        raise BadRequest(message, param=f"{where}.num_frames")
    if fps is not None and (not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= _MOST_FPS):
        raise BadRequest(f"{where}.fps must be a number above 0, at most {_MOST_FPS:g}", param=f"{where}.fps")
    if frames is not None and fps is not None:
        raise BadRequest(f"{where}: num_frames and fps exclude each other", param=f"{where}.fps")
    return Wanted(frames, None if fps is None else float(fps))


def with_sound(sources: list[Source], asked: bool | None, more: dict[str, Any] | None) -> list[Source]:
    """Videos whose sound is heard too, where `use_audio_in_video` is true: as a field of the request (SGLang), or in
    its `mm_processor_kwargs` (vLLM).

    Raises:
        BadRequest: it is neither true nor false.
    """
    name, value = "use_audio_in_video", cast("Any", asked)
    if asked is None and more is not None and name in more:
        value, name = more[name], f"mm_processor_kwargs.{name}"
    if value is None or value is False:
        return sources
    if value is not True:
        raise BadRequest(f"{name}: expected true or false", param=name)
    return [replace(one, wanted=replace(one.wanted, sound=True)) if one.kind == "video" else one for one in sources]


def several(value: Any, where: str, kind: str = "image") -> list[Source]:
    """None, one picture, video or sound, or a list of them; a processor's tensors are as many as they have."""
    if value is None or (isinstance(value, str) and not value):
        return []
    if not isinstance(value, list | tuple):
        return _some(value, where, kind)
    items = cast("list[Any]", list(value))
    return [one for number, item in enumerate(items) for one in _some(item, f"{where}[{number}]", kind)]


def _some(value: Any, where: str, kind: str) -> list[Source]:
    form: Any = cast("dict[str, Any]", value).get("format") if isinstance(value, dict) else None
    if form is None or kind != "image":
        return [source_of(value, where, kind)]
    if form != FORMAT:
        message = f"{where}.format {form!r:.100}: only {FORMAT!r} is taken"
        raise BadRequest(message, param=f"{where}.format", code="not_supported")
    tensors = Tensors(value, where)
    return [Source("", where, read=(tensors, number)) for number in range(tensors.count)]


def of_prompts(value: Any, where: str, count: int, batch: bool, kind: str = "image") -> list[list[Source]]:
    """`image_data` and the like of `/generate`: one or a list; of several prompts a list with an entry for each.

    Raises:
        BadRequest: there are not as many entries as prompts.
    """
    if not batch:
        return [several(value, where, kind)]
    if value is None or value in ("", []):
        return [[] for _ in range(count)]
    if not isinstance(value, list | tuple):
        return [several(value, where, kind) for _ in range(count)]
    items = cast("list[Any]", list(value))
    if len(items) != count:
        raise BadRequest(f"{where} has {len(items)} entries for {count} prompts", param=where)
    return [several(item, f"{where}[{number}]", kind) for number, item in enumerate(items)]


def block_source(block: dict[str, Any], where: str, kind: str = "image") -> Source:
    """The picture or PDF of one of Anthropic's blocks. Raises BadRequest."""
    source: Any = block.get("source")
    found = cast("dict[str, Any]", source) if isinstance(source, dict) else {}
    if found.get("type") == "base64" and isinstance(found.get("data"), str):
        return Source(found["data"], f"{where}.source.data", plain=True, kind=kind)
    if found.get("type") == "url" and isinstance(found.get("url"), str):
        return Source(found["url"], f"{where}.source.url", kind=kind)
    raise BadRequest(f"{where}.source: expected base64 with data, or url with an url", param=f"{where}.source")


def file_source(file: Any, where: str) -> Source:
    """The file of OpenAI's `file` and `input_file`: `file_data` (data URI, base64) or `file_url`. It is a PDF, or a
    picture, video or sound where its media type or the end of its name says so. Raises BadRequest."""
    found = cast("dict[str, Any]", file) if isinstance(file, dict) else {}
    for name in ("file_data", "file_url"):
        if isinstance(found.get(name), str) and found[name]:
            return Source(found[name], f"{where}.{name}", kind=_kind_of_file(found[name], found.get("filename")))
    if found.get("file_id") is not None:
        message = f"{where}.file_id: files are not kept here; send file_data"
        raise BadRequest(message, param=f"{where}.file_id", code="not_supported")
    raise BadRequest(f"{where}: expected file_data", param=where)


def _kind_of_file(text: str, filename: Any) -> str:
    told: str | None = None
    if text[:128].rpartition(",")[2].startswith("JVBERi0"):  # a PDF in base64, whatever its type
        return "document"
    if text.startswith("data:"):
        told = text[5:64].partition(";")[0].partition(",")[0].lower()
    elif "://" in text[:16]:
        told = mimetypes.guess_type(text.partition("?")[0].partition("#")[0])[0]
    if isinstance(filename, str) and told in (None, "", "application/octet-stream"):
        told = mimetypes.guess_type(filename[-64:])[0]
    kind = (told or "").partition("/")[0]
    return kind if kind in NAMES else "document"


def audio_source(value: Any, where: str) -> Source:
    """The sound of `input_audio`: `data` in base64, or a data URI; `format` is not looked at. Raises BadRequest."""
    data: Any = cast("dict[str, Any]", value).get("data") if isinstance(value, dict) else None
    if not isinstance(data, str) or not data:
        raise BadRequest(f"{where}.data is missing", param=f"{where}.data")
    return Source(data, f"{where}.data", plain=not data.startswith("data:"), kind="audio")


def seen(
    messages: list[dict[str, Any]], reader: MediaReader | None, template: ChatTemplate | None
) -> tuple[list[dict[str, Any]], list[Source]]:
    """A conversation with places for its media as the template writes them, and the media in order.

    Raises:
        BadRequest: the model takes none, or a part is neither text nor a medium.
    """
    media: list[Source] = []
    found: list[dict[str, Any]] = []
    for at, message in enumerate(messages):
        content: Any = message.get("content")
        if not isinstance(content, list) or all(_kind(part) not in MEDIA for part in cast("list[Any]", content)):
            found.append(message)
            continue
        parts = [
            _part(part, f"messages[{at}].content[{number}]") for number, part in enumerate(cast("list[Any]", content))
        ]
        own = [part for part in parts if isinstance(part, Source)]
        for one in own:
            if reader is None or one.shown not in reader.processors:
                what = NAMES[one.shown] if one.kind != "document" else "documents"
                raise BadRequest(f"this model takes no {what}", param=one.where, code="not_supported")
        assert reader is not None
        media += own
        found.append({**message, "content": _shown(parts, reader, template)})
    return found, media


def _shown(parts: list[dict[str, Any] | Source], reader: MediaReader, template: ChatTemplate | None) -> Any:
    """Parts as the template takes them; what it does not know as what usually stands for it."""
    kinds = {part.shown for part in parts if isinstance(part, Source)}
    known = {kind for kind in kinds if template is not None and template.shows(kind)}
    texts = [reader.processors[part.shown].inline if isinstance(part, Source) else part["text"] for part in parts]
    if not known:
        return "\n".join(texts)
    return [
        {"type": part.shown} if isinstance(part, Source) and part.shown in known else {"type": "text", "text": text}
        for part, text in zip(parts, texts, strict=True)
    ]


def _kind(part: Any) -> Any:
    return cast("dict[str, Any]", part).get("type") if isinstance(part, dict) else None


def _part(part: Any, where: str) -> dict[str, Any] | Source:
    kind = _kind(part)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadRequest(f"{where}: text is missing", param=where)
        return {"type": "text", "text": part["text"]}
    if kind not in MEDIA:
        raise BadRequest(f"not supported yet: {where} of type {kind!r:.100}", param=where, code="not_supported")
    what = MEDIA[kind]
    if what == "document":
        given = part.get("file") if part.get("file") is not None else part.get("document")
        if isinstance(given, Source):
            return given
        return file_source(given if given is not None else part, f"{where}.file" if given is not None else where)
    name = next((name for name in (f"{what}_url", what, kind) if part.get(name) is not None), "")
    if not name:
        raise BadRequest(f"{where}: {kind} is missing", param=where)
    if kind == "input_audio" and isinstance(part[name], dict):
        return audio_source(part[name], f"{where}.{name}")
    return source_of(part[name], f"{where}.{name}", what)
