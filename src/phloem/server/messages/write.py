"""Answers of `/v1/messages`, whole and as events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Literal

from phloem.protocol.answers import Answer
from phloem.server.blocks import Block, Blocks, Change
from phloem.server.errors import messages_error
from phloem.server.stream import Ending, encode, named_event
from phloem.server.usage import is_cut

if TYPE_CHECKING:
    from phloem.client.call import Call
    from phloem.client.continuation import Continuation
    from phloem.core.errors import PhloemError
    from phloem.server.chat.convert import Conversation


class MessagesUsage(Answer, kw_only=True):
    """`input_tokens` are those that were computed; cached ones are counted beside them."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class MessagesAnswer(Answer, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage


class TokenCount(Answer, kw_only=True):
    input_tokens: int


class MessageWriter:
    """Writes one message, whole or as events."""

    def __init__(self, key: str, model: str, asked: Conversation) -> None:
        self.answer = MessagesAnswer(
            id=key, model=model, content=[], usage=MessagesUsage(input_tokens=0, output_tokens=0)
        )
        self.blocks = Blocks()
        self._parser = asked.parsers()[0]

    def whole(self, output: Continuation) -> MessagesAnswer:
        blocks = self.blocks.whole(self._parser.push(output.text, True, is_cut(output)))
        self.answer.content = [_block(block) for block in blocks]
        self._settle(output)
        return self.answer

    def _settle(self, output: Continuation) -> None:
        self.answer.usage = _usage(output)
        finish = output.finish
        if finish is not None and finish.type == "length":
            self.answer.stop_reason = "max_tokens"
        elif any(block.kind == "call" for block in self.blocks.blocks):
            self.answer.stop_reason = "tool_use"
        elif finish is not None and isinstance(finish.matched, str):
            self.answer.stop_reason, self.answer.stop_sequence = "stop_sequence", finish.matched
        else:
            self.answer.stop_reason = "end_turn"

    async def events(self, call: Call) -> AsyncGenerator[bytes, None]:
        begun = False
        async for outputs in call:
            data: list[bytes] = []
            for output in outputs:
                if not begun:
                    begun = True
                    self.answer.usage = _usage(output)
                    data.append(_event("message_start", message=self.answer))
                events = self._parser.push(output.delta, output.finish is not None, is_cut(output))
                changes = self.blocks.push(events)
                if output.finish is not None:
                    changes += self.blocks.finish()
                data += [_change(change) for change in changes]
                if output.finish is not None:
                    data += self._last(output)
            if data:
                yield b"".join(data)

    def _last(self, output: Continuation) -> list[bytes]:
        self._settle(output)
        delta = {"stop_reason": self.answer.stop_reason, "stop_sequence": self.answer.stop_sequence}
        return [_event("message_delta", delta=delta, usage=self.answer.usage), _event("message_stop")]


def _usage(output: Continuation) -> MessagesUsage:
    return MessagesUsage(
        input_tokens=output.prompt_tokens - output.cached_tokens,
        output_tokens=output.completion_tokens,
        cache_read_input_tokens=output.cached_tokens,
    )


def _block(block: Block) -> dict[str, Any]:
    match block.kind:
        case "text":
            return {"type": "text", "text": block.text, "citations": None}
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case "call":
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _input(block.text)}


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object. A model without a grammar may have written anything: nothing is lost."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return {"_raw": arguments}
    return value if isinstance(value, dict) else {"_raw": arguments}


def _change(change: Change) -> bytes:
    block = change.block
    if change.what == "close":
        return _event("content_block_stop", index=block.index)
    if change.what == "open":
        empty = Block(block.kind, block.index, block.id, name=block.name, call_id=block.call_id)
        return _event("content_block_start", index=block.index, content_block=_block(empty))
    match block.kind:
        case "text":
            delta = {"type": "text_delta", "text": change.text}
        case "reasoning":
            delta = {"type": "thinking_delta", "thinking": change.text}
        case "call":
            delta = {"type": "input_json_delta", "partial_json": change.text}
    return _event("content_block_delta", index=block.index, delta=delta)


def _event(name: str, **fields: Any) -> bytes:
    return named_event(name, {"type": name, **fields})


def _broken(error: PhloemError) -> bytes:
    return b"event: error\ndata: " + encode(messages_error(error, None)) + b"\n\n"


ENDING = Ending(b"", _broken)
