"""`/v1/responses`: answers that can be asked for again and gone on from."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from phloem.client.request import new_id
from phloem.core.errors import BadRequest, PhloemError
from phloem.protocol.body import Parser
from phloem.server.chat.convert import to_request
from phloem.server.door import Door, door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.responses.body import InputTokensBody, ResponseFields, ResponsesBody
from phloem.server.responses.convert import messages_of, to_chat
from phloem.server.responses.log import EventLog, Reader
from phloem.server.responses.store import Stored
from phloem.server.responses.write import (
    ENDING,
    DeletedResponse,
    InputTokens,
    ItemList,
    ResponseAnswer,
    ResponseWriter,
    begin,
    fail,
)
from phloem.server.stream import collect, stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from phloem.client.call import Call
    from phloem.server.chat.body import Message
    from phloem.server.chat.convert import Conversation

router = APIRouter(tags=["openai"])
log = logging.getLogger("phloem.server")
_parser = Parser(ResponsesBody)
_count = Parser(InputTokensBody)
_PATH = "/v1/responses/{response_id}"


@router.post(
    "/v1/responses", **describe(body=ResponsesBody, answer=ResponseAnswer, streams=True, errors=(404, *NEEDS_ENGINE))
)
async def create_response(request: Request) -> Response:
    """Answer a text or a list of items, or go on from an earlier response."""
    door = door_of(request)
    body = await door.read(request, _parser)
    door.check_model(body.model)
    store = body.store is not False
    if body.background and not store:
        raise BadRequest("background responses are stored", param="background")
    messages = _before(door, body) + messages_of(body.input)
    asked = await _asked(door, body, messages)
    model = door.adapt(asked.request, body.model)
    door.check_batch(asked.request)
    key = new_id("resp_")
    asked.request.items[0].id = key
    answer = begin(body, key, model, asked, store)
    entry = Stored(answer, messages, _shown(body))
    writer = ResponseWriter(answer, asked, door.client.tokenizer)
    call = await door.client.submit(asked.request)
    try:
        if store:
            door.responses.put(entry)
    except BaseException:
        call.cancel()
        raise
    if body.background:
        entry.log = EventLog() if body.stream else None
        task = asyncio.create_task(_work(door, entry, writer, call))
        door.responses.tasks.add(task)
        task.add_done_callback(door.responses.tasks.discard)
        return await _replay(request, entry.log) if entry.log is not None else json_response(answer)
    if asked.request.stream:
        return await stream(request, call, _kept(door, entry, writer, call), ENDING)
    try:
        writer.finish((await collect(request, call))[0])
    except PhloemError as error:
        fail(answer, error)
        raise
    finally:
        _keep(door, entry, writer)
    return json_response(answer)


def _before(door: Door, body: ResponseFields) -> list[Message]:
    """The conversation that a response goes on from."""
    if not body.previous_response_id:
        return []
    earlier = door.responses.get(body.previous_response_id)
    if earlier.answer.status not in ("completed", "incomplete"):
        message = f"response {body.previous_response_id!r} is {earlier.answer.status}: nothing goes on from it"
        raise BadRequest(message, param="previous_response_id")
    return list(earlier.messages)


# What chat calls it, and what it is called here.
NAMES = (
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    (".function.", "."),
    ("max_completion_tokens", "max_output_tokens"),
)


async def _asked(door: Door, body: ResponseFields, messages: list[Message]) -> Conversation:
    chat = to_chat(body, messages)
    chat.refuse_later(door.info.features)
    return await to_request(chat, door.client, door.info, NAMES)


@router.post("/v1/responses/input_tokens", **describe(body=InputTokensBody, answer=InputTokens, errors=(400, 404)))
async def count_input_tokens(request: Request) -> Response:
    """How many tokens the prompt of a response has."""
    door = door_of(request)
    body = await door.read(request, _count)
    door.check_model(body.model)
    messages = _before(door, body) + (messages_of(body.input) if body.input else [])
    item = (await _asked(door, body, messages)).request.items[0]
    (prompt,) = await door.client.admission.prompts([item])
    return json_response(InputTokens(input_tokens=len(prompt.ids)))


async def _kept(door: Door, entry: Stored, writer: ResponseWriter, call: Call) -> AsyncGenerator[bytes, None]:
    events = writer.events(call)
    try:
        async for data in events:
            yield data
    finally:
        await events.aclose()
        _keep(door, entry, writer)


async def _work(door: Door, entry: Stored, writer: ResponseWriter, call: Call) -> None:
    """A background response, from its submission to its end."""
    entry.answer.status = "in_progress"
    broken: PhloemError | None = None
    try:
        if entry.log is not None:
            async for data in writer.events(call):
                entry.log.add(data)
        else:
            async for outputs in call:
                writer.finish(outputs[0])
    except PhloemError as error:
        broken = error
    except Exception as error:
        log.exception("response %s failed", entry.answer.id)
        broken = PhloemError(f"internal error: {type(error).__name__}")
    finally:
        if broken is not None:
            fail(entry.answer, broken)
        call.cancel()
        _keep(door, entry, writer)
        if entry.log is not None:
            entry.log.end(broken)


async def _replay(request: Request, events: EventLog, after: int = -1) -> Response:
    reader = Reader()
    return await stream(request, reader, events.read(reader, after), ENDING)


def _keep(door: Door, entry: Stored, writer: ResponseWriter) -> None:
    """The response has ended, however: the store learns what came of it."""
    if entry.running:
        fail(entry.answer, PhloemError("the client has disconnected"))
    if entry.answer.status in ("completed", "incomplete"):
        entry.messages = [*entry.messages, writer.message()]
    if entry.answer.store and entry.answer.id in door.responses:
        door.responses.put(entry)


def _shown(body: ResponsesBody) -> list[dict[str, Any]]:
    """The input as `input_items` lists it."""
    given = body.input
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [{"id": new_id("msg_"), "type": "message", **item} for item in given]


@router.get(_PATH, **describe(answer=ResponseAnswer, streams=True, errors=(400, 404, *NEEDS_ENGINE)))
async def get_response(
    request: Request,
    response_id: str,
    stream: Annotated[
        bool, Query(description="The events of a background response that was made with stream.")
    ] = False,
    starting_after: Annotated[
        int | None, Query(ge=0, description="The number of the last event that is known.")
    ] = None,
) -> Response:
    """A stored response, as it stands; or its events, from the beginning or from where a stream broke."""
    entry = door_of(request).responses.get(response_id)
    if not stream:
        if starting_after is not None:
            raise BadRequest("starting_after needs stream", param="starting_after")
        return json_response(entry.answer)
    if entry.log is None:
        raise BadRequest("only background responses that were made with stream keep their events", param="stream")
    return await _replay(request, entry.log, -1 if starting_after is None else starting_after)


@router.delete(_PATH, **describe(answer=DeletedResponse, errors=(404,)))
async def delete_response(request: Request, response_id: str) -> Response:
    """Forget a response; one in progress is ended."""
    door = door_of(request)
    if door.responses.get(response_id).running:
        door.client.abort(response_id)
    door.responses.delete(response_id)
    return json_response(DeletedResponse(id=response_id))


@router.get(_PATH + "/input_items", **describe(answer=ItemList, errors=(404,)))
async def input_items(request: Request, response_id: str) -> Response:
    """The input of a response, without what it went on from."""
    items = door_of(request).responses.get(response_id).items
    ids = [str(item["id"]) for item in items]
    return json_response(ItemList(data=items, first_id=ids[0], last_id=ids[-1]))


@router.post(_PATH + "/cancel", **describe(answer=ResponseAnswer, errors=(400, 404)))
async def cancel_response(request: Request, response_id: str) -> Response:
    """End a response in progress."""
    door = door_of(request)
    entry = door.responses.get(response_id)
    if entry.running:
        door.client.abort(response_id)
        entry.answer.status = "cancelled"
    elif entry.answer.status != "cancelled":
        raise BadRequest(f"response {response_id!r} is {entry.answer.status}: nothing to cancel", param="response_id")
    return json_response(entry.answer)
