"""`/v1/audio/transcriptions` and `/v1/audio/translations`: speech to text, whole or streamed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.call import ClientGone
from phloem.core.errors import BadRequest
from phloem.protocol.audio import write
from phloem.protocol.audio.body import TranscriptionBody, TranslationBody
from phloem.protocol.audio.run import Asked, Transcriber, asked_of
from phloem.protocol.body import Body, Parser
from phloem.server.door import Door, door_of, json_response
from phloem.server.multipart import form_of
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import OPENAI_ENDING, Ending, event, stream, watch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from phloem.client.call import Call
    from phloem.client.continuation import Continuation
    from phloem.client.request import GenerateRequest
    from phloem.multimodal._audio import Heard
    from phloem.protocol.audio.run import Transcript

T = TypeVar("T", bound=Body)
router = APIRouter(tags=["openai"])
_transcription, _translation = Parser(TranscriptionBody), Parser(TranslationBody)
_FILES, _LISTS = frozenset({"file"}), frozenset({"timestamp_granularities", "include"})
_ERRORS = (404, *NEEDS_ENGINE)
_REFS = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in (write.TranscriptionAnswer, write.VerboseAnswer)]
_ANSWER: dict[str, Any] = {"anyOf": _REFS}
_ENDING = Ending(b"", OPENAI_ENDING.error)


@router.post(
    "/v1/audio/transcriptions",
    **describe(body=TranscriptionBody, answer=_ANSWER, streams=True, errors=_ERRORS, form=True),
)
async def transcriptions(request: Request) -> Response:
    """What is said in a sound file."""
    door = door_of(request)
    body = await _read(door, request, _transcription)
    door.check_model(body.model)
    body.check()
    asked = asked_of(body)
    return await _answer(door, request, body.file, asked, body.response_format, stream_it=body.stream)


@router.post("/v1/audio/translations", **describe(body=TranslationBody, answer=_ANSWER, errors=_ERRORS, form=True))
async def translations(request: Request) -> Response:
    """In English what is said in a sound file."""
    door = door_of(request)
    body = await _read(door, request, _translation)
    door.check_model(body.model)
    return await _answer(door, request, body.file, asked_of(body), body.response_format)


async def _read(door: Door, request: Request, parser: Parser[T]) -> T:
    parts = [part async for part in request.stream()]
    door.info.check_pooled(False, True)
    data = parts.pop() if len(parts) == 1 else b"".join(parts)
    values = form_of(data, request.headers.get("content-type", ""), _FILES, _LISTS)
    if not isinstance(values.get("file"), bytes):
        raise BadRequest("file: the form has no sound file", param="file")
    body = parser.convert(values, door.info.features, form=True)
    return body


class _Work:
    """What the engine does for one answer; ended when the client leaves."""

    background = False

    def __init__(self, door: Door) -> None:
        self._door = door
        self._calls: set[Call] = set()
        self._ended = False

    async def submit(self, asked: GenerateRequest) -> list[Continuation]:
        if self._ended:
            raise ClientGone("the client has left")
        call = await self._door.client.submit(asked)
        self._calls.add(call)
        try:
            async for outputs in call:
                return outputs
            raise ClientGone("the client has left")
        finally:
            call.cancel()
            self._calls.discard(call)

    def cancel(self) -> None:
        self._ended = True
        for call in list(self._calls):
            call.cancel()


async def _answer(
    door: Door, request: Request, data: bytes, asked: Asked, kind: str, *, stream_it: bool = False
) -> Response:
    work = _Work(door)
    transcriber = Transcriber(door.client, work.submit)
    asked = transcriber.check(asked)
    most = door.config.server.max_audio_seconds
    if stream_it:
        heard = await transcriber.hear(data, most)
        return await stream(request, work, _events(transcriber, heard, asked), _ENDING)
    left = asyncio.create_task(watch(request.receive, work))
    try:
        found = await transcriber.whole(data, asked, most)
    finally:
        left.cancel()
        work.cancel()
    if kind == "json":
        return json_response(write.TranscriptionAnswer(text=found.text, usage=write.usage(found)))
    if kind == "verbose_json":
        return json_response(write.verbose(found, asked))
    media = "text/vtt" if kind == "vtt" else "text/plain"
    return Response(write.written(found, kind), media_type=f"{media}; charset=utf-8")


async def _events(transcriber: Transcriber, heard: Heard, asked: Asked) -> AsyncGenerator[bytes, None]:
    """What is told is never taken back: a window's text comes when it looks right."""
    told: str = ""
    found: Transcript | None = None
    async for found in transcriber.run(heard, asked):
        text = found.text
        if len(text) > len(told):
            yield event(write.TextDelta(delta=text[len(told) :]))
            told = text
    assert found is not None
    yield event(write.TextDone(text=told, usage=write.usage(found)))
