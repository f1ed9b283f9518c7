"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.request import new_id
from phloem.server.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
)
from phloem.server.body import Parser
from phloem.server.chat.convert import to_request
from phloem.server.chat.deltas import PlainText
from phloem.server.door import door_of, json_response
from phloem.server.logprobs import chat_logprobs
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.protocol import ChatBody
from phloem.server.stream import collect, stream
from phloem.server.usage import extensions_of, last_hidden, matched_stop, stream_chunks, usage_of

if TYPE_CHECKING:
    from phloem.client.call import Call
    from phloem.client.continuation import Continuation
    from phloem.server.answers import ChatLogprobs
    from phloem.server.chat.deltas import DeltaParser
    from phloem.text.tokenizer import Tokenizer

router = APIRouter(tags=["openai"])
_parser = Parser(ChatBody)


@router.post(
    "/v1/chat/completions",
    **describe(body=ChatBody, answer=ChatCompletion, streams=True, errors=(404, *NEEDS_ENGINE)),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    door = door_of(request)
    body = await door.read(request, _parser)
    door.check_model(body.model)
    asked = await to_request(body, door.client, door.info)
    door.check_batch(asked.request)
    call = await door.client.submit(asked.request)
    key = body.rid or new_id("chatcmpl-")
    writer = _Writer(body, key, door.info.served_model_name, door.client.tokenizer, asked.parsers())
    if asked.request.stream:
        return await stream(request, call, writer.events(call))
    return json_response(writer.answer(await collect(request, call)))


def _whole(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a whole answer: a delta without its index."""
    return {name: value for name, value in call.items() if name != "index"}


class _Writer:
    """Writes one call's answer, whole or in chunks."""

    def __init__(
        self, body: ChatBody, key: str, model: str, tokenizer: Tokenizer | None, parsers: list[DeltaParser]
    ) -> None:
        self.body = body
        self.id = key
        self.model = model
        self.tokenizer = tokenizer
        self.parsers = parsers
        self.created = int(time.time())

    def answer(self, outputs: list[Continuation]) -> ChatCompletion:
        choices: list[ChatChoice] = []
        for output in outputs:
            delta = self.parsers[output.choice].push(output.text, True)
            reason = output.finish.type if output.finish is not None else None
            message = ChatMessage(
                role="assistant",
                content=delta.content if delta.content or not delta.tool_calls else None,
                reasoning_content=delta.reasoning_content or None,
                tool_calls=[_whole(call) for call in delta.tool_calls] or None,
            )
            choices.append(
                ChatChoice(
                    index=output.choice,
                    message=message,
                    logprobs=self._logprobs(output, 0),
                    finish_reason="tool_calls" if delta.tool_calls and reason == "stop" else reason,
                    matched_stop=matched_stop(output.finish),
                    hidden_states=last_hidden(output),
                )
            )
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage_of(outputs),
            sglext=extensions_of(self.body, outputs),
        )

    def events(self, call: Call) -> AsyncGenerator[bytes, None]:
        began: set[int] = set()
        called: set[int] = set()

        def chunks(output: Continuation) -> list[ChatChunk]:
            return [self._chunk([choice]) for choice in self._choices(output, began, called)]

        def plain(output: Continuation, text: str) -> ChatChunk:
            return self._chunk([ChatChunkChoice(index=output.choice, delta=ChatDelta(content=text))])

        simple = all(isinstance(parser, PlainText) for parser in self.parsers) and not self.body.logprobs
        return stream_chunks(self.body, call, chunks, lambda: self._chunk([]), plain if simple else None)

    def _choices(self, output: Continuation, began: set[int], called: set[int]) -> list[ChatChunkChoice]:
        index, out = output.choice, list[ChatChunkChoice]()
        if index not in began:
            began.add(index)
            out.append(ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")))
        parsed = self.parsers[index].push(output.delta, output.finish is not None)
        logprobs = self._logprobs(output, output.new_from)
        delta = ChatDelta()
        if parsed.reasoning_content:
            delta.reasoning_content = parsed.reasoning_content
        if parsed.tool_calls:
            called.add(index)
            delta.tool_calls = parsed.tool_calls
        if parsed.content or (logprobs is not None and logprobs.content):
            delta.content = parsed.content
        if parsed.content or parsed.reasoning_content or parsed.tool_calls or (logprobs and logprobs.content):
            out.append(ChatChunkChoice(index=index, delta=delta, logprobs=logprobs))
        if output.finish is not None:
            reason = output.finish.type
            out.append(
                ChatChunkChoice(
                    index=index,
                    delta=ChatDelta(),
                    finish_reason="tool_calls" if index in called and reason == "stop" else reason,
                    matched_stop=matched_stop(output.finish),
                    hidden_states=last_hidden(output),
                )
            )
        return out

    def _logprobs(self, output: Continuation, begin: int) -> ChatLogprobs | None:
        if not output.item.return_logprob:
            return None
        return chat_logprobs(output, begin, len(output.ids), self.tokenizer)

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices)
