"""The frame of a stream of chunks, as chat and text completions have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from msgspec import UNSET, UnsetType

from phloem.server.stream import TextEvent, event
from phloem.server.usage import extensions_of, usage_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from phloem.client.call import Call
    from phloem.client.continuation import Continuation
    from phloem.protocol.answers import Extensions, Usage
    from phloem.protocol.fields import OpenAIBody

    Chunks = Callable[[Continuation], Sequence["Chunk"]]
    Blank = Callable[[], "Chunk"]
    Plain = Callable[[Continuation, str], "Chunk"]


class Chunk(Protocol):
    """What both APIs' chunks have, and what is set here; msgspec encodes the whole."""

    usage: Usage | UnsetType | None
    sglext: Extensions | UnsetType


async def stream_chunks(
    body: OpenAIBody, call: Call, chunks: Chunks, blank: Blank, plain: Plain | None = None
) -> AsyncGenerator[bytes, None]:
    """The events of a call: `chunks` of each output's news, then, without choices (`blank`), what was asked for.

    `plain(output, text)` gives the one chunk that `chunks` would give for an output with no news but this text. It is
    given where that is so for every event between an output's first and its last.
    """
    options = body.stream_options
    final = options is not None and bool(options.include_usage)
    always = options is not None and bool(options.continuous_usage_stats)
    texts: dict[str, TextEvent] = {}  # of outputs that have begun
    async for outputs in call:
        data: list[bytes] = []
        for output in outputs:
            if output.finish is None and (write := texts.get(output.id)) is not None:
                if output.delta:
                    data.append(write(output.delta))
                continue
            for chunk in chunks(output):
                _set_usage(chunk, output, final, always)
                data.append(event(chunk))
            if plain is not None and not always:
                write = texts[output.id] = _text_event(plain, output, final)
                call.frame = lambda _, text, write=write: write(text) if text else b""
        if data or not outputs:
            yield data[0] if len(data) == 1 else b"".join(data)
    extensions = extensions_of(body, call.outputs)
    if extensions is not UNSET:
        chunk = blank()
        chunk.sglext = extensions
        yield event(chunk)
    if final:
        chunk = blank()
        chunk.usage = usage_of(call.outputs)
        yield event(chunk)


def _set_usage(chunk: Chunk, output: Continuation, final: bool, always: bool) -> None:
    if always:
        chunk.usage = usage_of([output])
    elif final:
        chunk.usage = None


def _text_event(plain: Plain, output: Continuation, final: bool) -> TextEvent:
    def make(text: str) -> Chunk:
        chunk = plain(output, text)
        _set_usage(chunk, output, final, False)
        return chunk

    return TextEvent(make)
