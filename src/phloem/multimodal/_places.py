"""Media in prompts: what stands for each where its mark is, and the tokens that it takes."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, cast

import numpy as np

from phloem.core.errors import BadRequest
from phloem.core.media import Media

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from phloem.multimodal import Picture, Processor

NAMES = {"image": "pictures", "video": "videos", "audio": "sounds"}


class Made:
    """What became of one source: a picture, video or sound, or a document's pages. `kind` is never a document's.

    `spread`: a prompt of ids may have all of its placeholders already, as processors of transformers write it.
    """

    def __init__(self, kind: str, parts: Sequence[tuple[Picture, bytes]], spread: bool = False) -> None:
        self.kind, self.parts, self.spread = kind, parts, spread

    def text(self, processor: Processor) -> str:
        """Of pages: as many pictures one after the other, with what usually stands around each."""
        first, _, last = processor.inline.partition(processor.mark)
        return (last + first).join(picture.text for picture, _ in self.parts)


def with_places(
    text: str, made: Sequence[Made], processors: Mapping[str, Processor], where: str
) -> tuple[str, list[Made]]:
    """The prompt with what stands for its media where their marks are, and these in its order.

    Args:
        made: of each kind in the order of its marks.

    Raises:
        BadRequest: it has other numbers of marks.
    """
    marks = {kind: one.mark for kind, one in processors.items()}
    for kind, mark in marks.items():
        own, usual = sum(one.kind == kind for one in made), f"<{kind}>"
        if own and mark not in text and text.count(usual) == own:
            text = text.replace(usual, processors[kind].inline)  # what programs write that know no model
    pattern = "|".join(re.escape(mark) for mark in marks.values())
    found = re.findall(pattern, text)
    ordered = _ordered(made, [_kind_of(mark, marks) for mark in found], marks, where)
    rest = iter(ordered)
    return re.sub(pattern, lambda _: (one := next(rest)).text(processors[one.kind]), text), ordered


def with_ids(
    ids: Sequence[int],
    made: Sequence[Made],
    processors: Mapping[str, Processor],
    encode: Callable[[str], list[int]],
    where: str,
) -> tuple[list[int], list[Made]]:
    """As `with_places`, of a prompt of token ids."""
    ids = _folded(ids, [one for one in made if one.spread], processors, encode)
    marks = {kind: one.mark for kind, one in processors.items()}
    tokens = {kind: encode(mark) for kind, mark in marks.items()}
    kinds: list[str] = []
    pieces: list[list[int]] = [[]]
    at = 0
    while at < len(ids):
        kind = next((kind for kind, mark in tokens.items() if list(ids[at : at + len(mark)]) == mark), None)
        if kind is None:
            pieces[-1].append(ids[at])
            at += 1
            continue
        kinds.append(kind)
        pieces.append([])
        at += len(tokens[kind])
    ordered = _ordered(made, kinds, marks, where)
    found = pieces[0]
    for one, piece in zip(ordered, pieces[1:], strict=True):
        found = found + encode(one.text(processors[one.kind])) + piece
    return found, ordered


def _folded(
    ids: Sequence[int],
    made: Sequence[Made],
    processors: Mapping[str, Processor],
    encode: Callable[[str], list[int]],
) -> Sequence[int]:
    """With the mark of each where all of its placeholders are."""
    if not made or not all(0 <= token <= sys.maxunicode for token in ids):
        return ids
    letters, found = "".join(map(chr, ids)), ""  # strings are searched in linear time
    for one in made:
        processor = processors[one.kind]
        runs = iter([run for picture, _ in one.parts for run in picture.runs])
        (placeholder,) = encode(processor.placeholder)
        spelled = encode(one.text(processor))
        whole = "".join(chr(token) * (next(runs) if token == placeholder else 1) for token in spelled)
        before, met, after = letters.partition(whole)
        if met:
            found, letters = found + before + "".join(map(chr, encode(processor.mark))), after
    return [ord(letter) for letter in found + letters]


def _kind_of(mark: str, marks: Mapping[str, str]) -> str:
    return next(kind for kind, own in marks.items() if own == mark)


def _ordered(made: Sequence[Made], kinds: list[str], marks: Mapping[str, str], where: str) -> list[Made]:
    for kind, mark in marks.items():
        own, places = sum(one.kind == kind for one in made), kinds.count(kind)
        if own != places:
            what = NAMES[kind]
            found = "1 place" if places == 1 else f"{places} places"
            message = f"the prompt has {found} for {what} ({mark}), the request {own} {what}"
            raise BadRequest(message, param=where)
    rest = {kind: iter([one for one in made if one.kind == kind]) for kind in marks}
    return [next(rest[kind]) for kind in kinds]


def grown(ids: list[int], made: Sequence[Made], tokens: Mapping[str, int], where: str) -> tuple[list[int], list[Media]]:
    """The prompt with as many placeholders as its media take, and what the engine is told of them.

    Args:
        made: in the order of the prompt: kinds may share a placeholder.

    Raises:
        BadRequest: it has placeholders of its own.
    """
    waiting = {
        token: iter([part for one in made if tokens[one.kind] == token for part in one.parts])
        for token in tokens.values()
    }
    found: list[int] = []
    media: list[Media] = []
    open_runs: dict[int, list[int]] = {token: [] for token in waiting}
    spans: dict[int, list[tuple[int, int]]] = {}
    for token in ids:
        if token not in waiting:
            found.append(token)
            continue
        runs = open_runs[token]
        if not runs:
            following = next(waiting[token], None)
            if following is None:
                raise BadRequest("the prompt has placeholders of media that are none", param=where)
            picture, digest = following
            runs.extend(picture.runs)
            spans[token] = []
            media.append(_told(picture, digest, token, spans[token]))
            if picture.beside is not None:
                sound, digest = picture.beside
                other = tokens["audio"]
                open_runs[other].extend(sound.runs)
                spans[other] = []
                media.append(_told(sound, digest, other, spans[other]))
        count = runs.pop(0)
        spans[token].append((len(found), count))
        found += [token] * count
    if any(open_runs.values()) or any(next(rest, None) is not None for rest in waiting.values()):
        raise BadRequest("the prompt has fewer placeholders than its media", param=where)
    return found, media


def _told(picture: Picture, digest: bytes, token: int, spans: list[tuple[int, int]]) -> Media:
    pixels = np.ascontiguousarray(picture.pixels)
    return Media(
        digest=digest,
        token=token,
        spans=spans,
        pixels=pixels.tobytes(),
        shape=cast("tuple[int, int, int, int]", tuple(pixels.shape)),
        scale=list(picture.scale),
        extra=list(picture.extra),
        grids=list(picture.grids),
        times=list(picture.times),
        mingled=picture.mingled,
    )
