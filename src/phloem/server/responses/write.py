"""`/v1/responses`: the response object, and the events by which it is streamed, in OpenAI's names and order."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from phloem.core.errors import PhloemError
from phloem.protocol.answers import Answer
from phloem.server.blocks import Block, Blocks, Change
from phloem.server.chat.logprobs import chat_logprobs
from phloem.server.responses.convert import answer_message
from phloem.server.stream import Ending, named_event
from phloem.server.usage import is_cut

if TYPE_CHECKING:
    from phloem.client.call import Call
    from phloem.client.continuation import Continuation
    from phloem.core.request import FinishReason
    from phloem.server.chat.body import Message
    from phloem.server.chat.convert import Conversation
    from phloem.server.responses.body import ResponsesBody
    from phloem.text.tokenizer import Tokenizer


class InputTokensDetails(Answer, kw_only=True):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(Answer, kw_only=True):
    """`reasoning_tokens`: counted by tokenising the reasoning's text."""

    reasoning_tokens: int = 0


class ResponseUsage(Answer, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseAnswer(Answer, kw_only=True):
    """`POST /v1/responses`, `GET /v1/responses/{id}`, and inside the events of its stream."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["queued", "in_progress", "completed", "incomplete", "cancelled", "failed"]
    background: bool = False
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, Any]
    model: str
    output: list[dict[str, Any]] = []
    parallel_tool_calls: bool
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, str | None]
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int = 0
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class InputTokens(Answer, kw_only=True):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class DeletedResponse(Answer, kw_only=True):
    id: str
    object: Literal["response.deleted"] = "response.deleted"
    deleted: bool = True


class ItemList(Answer, kw_only=True):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


_PREFIX = {"text": "msg_", "call": "fc_", "reasoning": "rs_"}


def begin(body: ResponsesBody, key: str, model: str, asked: Conversation, store: bool) -> ResponseAnswer:
    """The response before anything has been generated: what was asked for, as it will be done."""
    sampling = asked.request.items[0].sampling
    text = body.text.format if body.text is not None else None
    effort = body.reasoning.effort if body.reasoning is not None else None
    return ResponseAnswer(
        id=key,
        created_at=int(time.time()),
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": effort, "summary": None},
        safety_identifier=body.safety_identifier,
        store=store,
        temperature=sampling.temperature,
        text={"format": text or {"type": "text"}},
        tool_choice=body.tool_choice if body.tool_choice is not None else "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
        user=body.user,
    )


def fail(answer: ResponseAnswer, error: PhloemError) -> None:
    """The response ends with an error."""
    answer.status = "failed"
    answer.error = {"code": "server_error", "message": error.message}


class ResponseWriter:
    """Writes one response: whole (`finish`), or as events (`events`) that end with it."""

    def __init__(self, answer: ResponseAnswer, asked: Conversation, tokenizer: Tokenizer | None) -> None:
        self.answer = answer
        self.tokenizer = tokenizer
        self.blocks = Blocks()
        self._parser = asked.parsers()[0]
        self._logprobs: dict[str, list[Any]] = {}  # block id -> of its text's tokens
        self._number = 0

    # --- whole

    def finish(self, output: Continuation) -> None:
        """Take the whole of an output."""
        for change in self.blocks.push(self._parser.push(output.text, True, is_cut(output))):
            self._note_logprobs(change, output, 0)
        self._end(output)

    def message(self) -> Message:
        """The answer as the conversation's next turn."""
        text = {kind: [b.text for b in self.blocks.blocks if b.kind == kind] for kind in ("text", "reasoning")}
        calls = [
            {"id": b.call_id, "type": "function", "function": {"name": b.name, "arguments": b.text}}
            for b in self.blocks.blocks
            if b.kind == "call"
        ]
        return answer_message(text["text"], text["reasoning"], calls)

    def _end(self, output: Continuation) -> list[Change]:
        changes = self.blocks.finish(at_least_text=True)
        self._settle(output.finish)
        status = "completed" if self.answer.status == "completed" else "incomplete"
        last = len(self.blocks.blocks) - 1
        self.answer.output = [
            self._item(block, status if block.index == last else "completed") for block in self.blocks.blocks
        ]
        self.answer.usage = self._usage(output)
        return changes

    def _settle(self, finish: FinishReason | None) -> None:
        self.answer.completed_at = int(time.time())
        match finish.type if finish is not None else "abort":
            case "stop":
                self.answer.status = "completed"
            case "length":
                self.answer.status = "incomplete"
                self.answer.incomplete_details = {"reason": "max_output_tokens"}
            case _:
                self.answer.status = "cancelled"

    def _usage(self, output: Continuation) -> ResponseUsage:
        thoughts = "".join(block.text for block in self.blocks.blocks if block.kind == "reasoning")
        count = 0
        if thoughts and self.tokenizer is not None:
            count = min(len(self.tokenizer.encode(thoughts, add_special_tokens=False)), output.completion_tokens)
        return ResponseUsage(
            input_tokens=output.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=output.cached_tokens),
            output_tokens=output.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=count),
            total_tokens=output.prompt_tokens + output.completion_tokens,
        )

    # --- pieces

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": _PREFIX[block.kind] + block.id, "status": status}
        empty = status == "in_progress"
        match block.kind:
            case "text":
                content = [] if empty else [self._part(block)]
                return {**item, "type": "message", "role": "assistant", "content": content}
            case "reasoning":
                content = [] if empty else [self._part(block)]
                return {**item, "type": "reasoning", "summary": [], "content": content}
            case "call":
                arguments = "" if empty else block.text
                named = {"call_id": block.call_id, "name": block.name, "arguments": arguments}
                return {**item, "type": "function_call", **named}

    def _part(self, block: Block, empty: bool = False) -> dict[str, Any]:
        text = "" if empty else block.text
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if empty else self._logprobs.get(block.id, [])
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _note_logprobs(self, change: Change, output: Continuation, begin_at: int) -> list[Any]:
        """The logprobs of the tokens that brought this text. Those of reasoning and calls are left out."""
        if not output.item.return_logprob or change.what != "more" or change.block.kind != "text":
            return []
        said = chat_logprobs(output, begin_at, output.item.top_logprobs, self.tokenizer)
        found: list[Any] = msgspec.to_builtins(said.content)
        for entry in found:
            for token in (entry, *entry["top_logprobs"]):
                token["bytes"] = token["bytes"] or []
        self._logprobs.setdefault(change.block.id, []).extend(found)
        return found

    # --- events

    async def events(self, call: Call) -> AsyncGenerator[bytes, None]:
        """Errors before the first output are raised (the request gets its status); later ones become events."""
        begun = False
        try:
            async for outputs in call:
                data: list[bytes] = []
                if not begun:
                    begun = True
                    data += [self._whole("response.created"), self._whole("response.in_progress")]
                for output in outputs:
                    data += self._news(output)
                if data:
                    yield b"".join(data)
        except PhloemError as error:
            fail(self.answer, error)
            if not begun:
                raise
            yield self._event("error", code="server_error", message=error.message, param=None)
            yield self._whole("response.failed")

    def _news(self, output: Continuation) -> list[bytes]:
        data: list[bytes] = []
        events = self._parser.push(output.delta, output.finish is not None, is_cut(output))
        for change in self.blocks.push(events):
            logprobs = self._note_logprobs(change, output, output.new_from)
            data += self._change(change, logprobs)
        if output.finish is not None:
            for change in self._end(output):
                data += self._change(change, [])
            ended = "completed" if self.answer.status == "completed" else "incomplete"
            data.append(self._whole(f"response.{ended}"))
        return data

    def _change(self, change: Change, logprobs: list[Any]) -> list[bytes]:
        block = change.block
        place = {"item_id": _PREFIX[block.kind] + block.id, "output_index": block.index}
        inside = {**place, "content_index": 0}
        if change.what == "open":
            item = self._item(block, "in_progress")
            opened = [self._event("response.output_item.added", output_index=block.index, item=item)]
            if block.kind != "call":
                part = self._part(block, empty=True)
                opened.append(self._event("response.content_part.added", **inside, part=part))
            return opened
        if change.what == "more":
            match block.kind:
                case "text":
                    name = "response.output_text.delta"
                    return [self._event(name, **inside, delta=change.text, logprobs=logprobs)]
                case "reasoning":
                    return [self._event("response.reasoning_text.delta", **inside, delta=change.text)]
                case "call":
                    return [self._event("response.function_call_arguments.delta", **place, delta=change.text)]
        return self._closed(block, place, inside)

    def _closed(self, block: Block, place: dict[str, Any], inside: dict[str, Any]) -> list[bytes]:
        if block.kind == "call":
            named = {"name": block.name, "arguments": block.text}
            data = [self._event("response.function_call_arguments.done", **place, **named)]
        else:
            part = self._part(block)
            if block.kind == "text":
                told = {"text": block.text, "logprobs": part["logprobs"]}
                data = [self._event("response.output_text.done", **inside, **told)]
            else:
                data = [self._event("response.reasoning_text.done", **inside, text=block.text)]
            data.append(self._event("response.content_part.done", **inside, part=part))
        last = bool(self.answer.output) and block.index == len(self.answer.output) - 1
        item = self.answer.output[block.index] if last else self._item(block, "completed")
        return [*data, self._event("response.output_item.done", output_index=block.index, item=item)]

    def _whole(self, name: str) -> bytes:
        return self._event(name, response=self.answer)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_event(name, {"type": name, "sequence_number": number, **fields})


def _broken(error: PhloemError) -> bytes:
    """For what no writer foresaw."""
    told = {"type": "error", "sequence_number": -1, "code": "server_error", "message": error.message, "param": None}
    return named_event("error", told)


ENDING = Ending(b"", _broken)
