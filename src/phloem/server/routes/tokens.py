"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.admission import THREAD_CHARACTERS
from phloem.client.request import Item
from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.protocol.answers import Answer
from phloem.protocol.body import Body, Later, Parser
from phloem.protocol.fields import Int32, Strings
from phloem.protocol.generate.convert import split_ids
from phloem.protocol.known import MEDIA_LATER
from phloem.protocol.media import seen, with_sound
from phloem.server.chat.body import Message
from phloem.server.chat.convert import plain_messages, render, template_kwargs, toolplan, with_tools
from phloem.server.door import Door, door_of, json_response
from phloem.server.openapi import describe


class TokenizeBody(Body, kw_only=True):
    """`POST /tokenize`: a prompt, several, or a conversation."""

    prompt: Strings = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    model: str | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    use_audio_in_video: bool | None = None

    later: ClassVar[dict[str, Later]] = {
        "tools": Later("tools", ([],)),
        "tool_choice": Later("tools", ("none", "auto")),
        "use_audio_in_video": MEDIA_LATER["use_audio_in_video"],
    }


class DetokenizeBody(Body, kw_only=True):
    """`POST /detokenize`: one list of token ids, or several."""

    tokens: list[Int32 | list[Int32]]
    skip_special_tokens: bool | None = None
    model: str | None = None


class TokenizeAnswer(Answer, kw_only=True):
    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int


class DetokenizeAnswer(Answer, kw_only=True):
    text: str | list[str]


router = APIRouter(tags=["tokens"])
_tokenize = Parser(TokenizeBody)
_detokenize = Parser(DetokenizeBody)


@router.post("/tokenize", **describe(body=TokenizeBody, answer=TokenizeAnswer, errors=(404,)))
@router.post("/v1/tokenize", **describe(body=TokenizeBody, answer=TokenizeAnswer, errors=(404,)))
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, of several, or of a conversation with all that its media take."""
    door = door_of(request)
    body = await door.read(request, _tokenize)
    door.check_model(body.model)
    special = body.add_special_tokens
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("exactly one of prompt and messages is needed", param="prompt")
    if body.messages is not None:
        messages, media = seen(plain_messages(body.messages), door.client.pictures, door.client.template)
        media = with_sound(media, body.use_audio_in_video, body.mm_processor_kwargs)
        shown = toolplan.plan(body.tools, body.tool_choice, None, door.info.tool_parser)
        prompt: str | list[str] = await render(
            door.client.template,
            with_tools(messages, shown, door.info),
            tools=None if door.info.explain_tools else shown.tools or None,
            add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
            continue_final_message=bool(body.continue_final_message),
            **template_kwargs(body.chat_template_kwargs, body.reasoning_effort),
        )
        special = bool(special)  # the template writes them
    else:
        prompt, media = body.prompt or "", []
    texts = [prompt] if isinstance(prompt, str) else prompt
    if media:
        item = Item(SamplingParams(), text=texts[0], add_special_tokens=special is not False, pictures=media)
        found = [(await door.client.admission.grown(item)).ids]
    else:
        found = [await _encode(door, text, special is not False) for text in texts]
    limit = door.info.context_length
    if isinstance(prompt, str):
        return json_response(TokenizeAnswer(tokens=[*found[0]], count=len(found[0]), max_model_len=limit))
    counts = [len(ids) for ids in found]
    return json_response(TokenizeAnswer(tokens=[*found], count=counts, max_model_len=limit))


async def _encode(door: Door, text: str, special: bool) -> list[int]:
    if len(text) > THREAD_CHARACTERS:
        return await asyncio.to_thread(door.client.admission.encode, text, special)
    return door.client.admission.encode(text, special)


@router.post("/detokenize", **describe(body=DetokenizeBody, answer=DetokenizeAnswer, errors=(404,)))
@router.post("/v1/detokenize", **describe(body=DetokenizeBody, answer=DetokenizeAnswer, errors=(404,)))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    door = door_of(request)
    body = await door.read(request, _detokenize)
    door.check_model(body.model)
    tokenizer = door.client.tokenizer
    if tokenizer is None:
        raise BadRequest("no tokenizer is loaded", param="tokens")
    lists = split_ids(body.tokens, "tokens")
    for token in (token for ids in lists for token in ids):
        if not 0 <= token < door.info.vocab_size:
            raise BadRequest(f"tokens: token id {token} is not in [0, {door.info.vocab_size})", param="tokens")
    texts = [tokenizer.decode(ids, body.skip_special_tokens is not False) for ids in lists]
    nested = any(isinstance(item, list) for item in body.tokens)
    return json_response(DetokenizeAnswer(text=texts if nested else texts[0]))
