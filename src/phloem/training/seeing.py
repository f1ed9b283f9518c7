"""Conversations with pictures, for models that see: the pictures read, and put into the text as the engine does it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phloem.client.start import make_client
from phloem.core.config import Config
from phloem.core.errors import BadRequest
from phloem.protocol.media import MEDIA, seen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.core.media import Media
    from phloem.multimodal._places import Made
    from phloem.multimodal._reader import MediaReader, Source
    from phloem.text.template import ChatTemplate

WHERE = "messages"
LONGEST_PATH = 4096  # letters; what is longer is base64


def has_pictures(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether a conversation brings pictures, videos or sounds."""
    parts = [part for one in messages if isinstance(one["content"], list) for part in one["content"]]
    return any(isinstance(part, dict) and part.get("type") in MEDIA for part in parts)


@dataclass(frozen=True)
class Seen:
    """A conversation with its media read. `messages`: as the template takes them."""

    messages: list[dict[str, Any]]
    sources: list[Source]
    made: list[Made]


class Eyes:
    """What reads pictures for one model. `folders`: files are named from there."""

    def __init__(self, reader: MediaReader, template: ChatTemplate, folders: Sequence[Path]) -> None:
        self._reader, self._template, self._folders = reader, template, tuple(folders)

    def see(self, messages: list[dict[str, Any]]) -> Seen:
        """Read a conversation's media.

        Raises:
            BadRequest: one cannot be had, read or taken.
        """
        shown, sources = seen(messages, self._reader, self._template)
        sources = [self._here(one) for one in sources]
        return Seen(shown, sources, asyncio.run(self._reader.read(sources)))

    def placed(self, text: str, made: Sequence[Made]) -> tuple[str, list[Made]]:
        """A conversation's text, or its beginning, with what stands for its media where their marks are; and those."""
        marks = {kind: processor.mark for kind, processor in self._reader.processors.items()}
        # The second is what templates write that know no model (`_places.with_places`).
        rest = {kind: text.count(mark) or text.count(f"<{kind}>") for kind, mark in marks.items()}
        own: list[Made] = []
        for one in made:
            if rest[one.kind]:
                rest[one.kind] -= 1
                own.append(one)
        return self._reader.with_places(text, own, WHERE)

    def grown(
        self, ids: list[int], mask: Sequence[bool], made: Sequence[Made]
    ) -> tuple[list[int], list[bool], list[Media]]:
        """A text with as many placeholders as its media take, and its mask, which has none of them."""
        found, media = self._reader.grown(ids, made, WHERE)
        counts = iter(count for _, count in sorted(span for item in media for span in item.spans))
        tokens, wide = set(self._reader.tokens.values()), list[bool]()
        for token, said in zip(ids, mask, strict=True):
            wide += [False] * next(counts) if token in tokens else [said]
        return found, wide, media

    def _here(self, source: Source) -> Source:
        """With the bytes of a file that is named by its path."""
        if source.data is not None or source.plain or source.text.startswith("data:") or "://" in source.text[:16]:
            return source
        try:
            paths = [folder / Path(source.text).expanduser() for folder in self._folders]
            path = next((path for path in paths if len(source.text) < LONGEST_PATH and path.is_file()), None)
            return source if path is None else replace(source, data=path.read_bytes())
        except (OSError, RuntimeError) as error:  # of a home that is none
            raise BadRequest(f"{source.where}: {source.text}: {error}", param=source.where) from None


def reader_of(model_path: str) -> MediaReader | None:
    """What reads pictures for the model; None: it takes none. Raises ConfigError."""
    return make_client(Config.from_flat({"model_path": model_path}))[0].pictures
