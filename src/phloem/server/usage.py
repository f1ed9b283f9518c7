"""What chat and text completions have in common on the way out: counts, finish reasons, the frame of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import UNSET, UnsetType

from phloem.server.answers import CachedTokensDetails, Extensions, PromptTokensDetails, Usage
from phloem.server.stream import TextEvent, event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from phloem.client.call import Call
    from phloem.client.continuation import Continuation
    from phloem.core.request import FinishReason
    from phloem.server.answers import ChatChunk, Completion
    from phloem.server.protocol import OpenAIBody

    Chunks = Callable[[Continuation], list[ChatChunk] | list[Completion]]
    Blank = Callable[[], ChatChunk | Completion]
    Plain = Callable[[Continuation, str], ChatChunk | Completion]


def usage_of(outputs: list[Continuation]) -> Usage:
    """Each prompt counts once, whatever its number of continuations."""
    prompts = {output.index: output for output in reversed(outputs)}.values()
    prompt = sum(output.prompt_tokens for output in prompts)
    completion = sum(output.completion_tokens for output in outputs)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(output.cached_tokens for output in prompts)),
    )


def extensions_of(body: OpenAIBody, outputs: list[Continuation]) -> Extensions | UnsetType:
    """`sglext`, where the request asks for what stands there."""
    if not body.return_cached_tokens_details:
        return UNSET
    cached = usage_of(outputs).prompt_tokens_details.cached_tokens
    return Extensions(cached_tokens_details=CachedTokensDetails(device=cached))


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


def _set_usage(chunk: ChatChunk | Completion, output: Continuation, final: bool, always: bool) -> None:
    if always:
        chunk.usage = usage_of([output])
    elif final:
        chunk.usage = None


def _text_event(plain: Plain, output: Continuation, final: bool) -> TextEvent:
    def make(text: str) -> ChatChunk | Completion:
        chunk = plain(output, text)
        _set_usage(chunk, output, final, False)
        return chunk

    return TextEvent(make)


def matched_stop(finish: FinishReason | None) -> int | str | None:
    return None if finish is None else finish.matched


def last_hidden(output: Continuation) -> list[float] | UnsetType:
    """The state that the last output token was chosen from, where that was asked for."""
    if not output.item.return_hidden or not output.hidden:
        return UNSET
    return np.frombuffer(output.hidden[-1], dtype="<f4").tolist()
