"""What the interpreter asks of a backend."""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phloem.core.errors import BadRequest
from phloem.lang.chat import FORMATS, ChatFormat
from phloem.lang.choices import ChoicesDecision, ChoicesMethod
from phloem.lang.ir import Media, Sampling

Meta = dict[str, Any]
Answer = tuple[str | list[str], Meta | list[Meta]]  # lists where `n` asks for several continuations


@dataclass
class Prompt:
    """A state, as a backend needs it: all its text; and its turns, with the open one apart."""

    text: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    role: str | None = None  # of the open turn
    partial: str = ""  # what the open turn holds already
    media: list[Media] = field(default_factory=list)


class Backend:
    """Base class. A backend that sees only turns (`chat_only`) writes nothing but the beginning of an assistant's."""

    chat_only = False
    max_stops: int | None = None

    @property
    def format(self) -> ChatFormat:
        """How turns are written as text."""
        return FORMATS["default"]

    def generate(self, prompt: Prompt, sampling: Sampling) -> Answer:
        raise NotImplementedError

    def generate_stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[tuple[str, Meta]]:
        """Pieces of text, each with the meta information so far."""
        text, meta = self.generate(prompt, sampling)
        if isinstance(text, list) or isinstance(meta, list):
            raise BadRequest("a stream has one continuation: n must be 1", param="n")
        yield text, meta

    def select(self, prompt: Prompt, choices: list[str], method: ChoicesMethod) -> ChoicesDecision:
        raise BadRequest(f"{type(self).__name__} cannot choose: it gives no log-probabilities of given text")

    def cache_prefix(self, text: str) -> Meta | None:
        """Compute a prefix that several requests are about to need. Nothing where the server shares none."""
        return None

    def flush_cache(self) -> bool:
        raise BadRequest(f"{type(self).__name__} has no cache that can be flushed")

    def get_server_info(self) -> dict[str, Any]:
        raise BadRequest(f"{type(self).__name__} tells nothing about its server")

    def shutdown(self) -> None:
        """Let go of connections, and of what was started for this backend."""

    # Names that programs written for SGLang's frontend may use.

    def get_chat_template(self) -> ChatFormat:
        return self.format

    def get_model_name(self) -> str:
        return "unknown"


def media_object(item: Media) -> dict[str, Any]:
    """The same as an object with `url`, and with `num_frames` of a video where they are said."""
    frames = {} if item.frames is None else {"num_frames": item.frames}
    return {"url": media_url(item), **frames}


def media_url(item: Media) -> str:
    """An image or video as a URL that servers take: http(s) and data URLs as they are, anything else as a data URL.

    Raises:
        BadRequest: the file cannot be read, or the value is none that can be sent.
    """
    source = item.source
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return source
    kind = "image/png" if item.kind == "image" else "video/mp4"
    if isinstance(source, str | Path):
        path = Path(source)
        if len(str(source)) < 4096 and path.is_file():
            kind = mimetypes.guess_type(path.name)[0] or kind
            return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        try:
            base64.b64decode(str(source), validate=True)
        except ValueError:
            raise BadRequest(f"{item.kind}: {str(source)!r:.100} is neither a file nor base64 data") from None
        return f"data:{kind};base64,{source}"
    if isinstance(source, bytes):
        return f"data:{kind};base64,{base64.b64encode(source).decode()}"
    if hasattr(source, "save"):
        data = io.BytesIO()
        source.save(data, format="PNG")
        return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    raise BadRequest(f"{item.kind}: a {type(source).__name__} cannot be sent")
