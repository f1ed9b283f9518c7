"""Answers of `/v1/chat/completions`, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from msgspec import UNSET, UnsetType

from phloem.protocol.answers import Answer, Extensions, Usage
from phloem.protocol.generate.body import GenerateBody
from phloem.protocol.generate.write import Renderer
from phloem.server.chat.functions import is_old
from phloem.server.chat.logprobs import ChatLogprobs, chat_logprobs
from phloem.server.chunks import stream_chunks
from phloem.server.token_ids import PromptLogprobs, ids_of, names, prompt_ids_of, prompt_logprobs_of
from phloem.server.usage import extensions_of, is_cut, last_hidden, matched_stop, usage_of
from phloem.text.answer import PlainAnswer, Reasoning
from phloem.text.tools._base import CallStart, Text

if TYPE_CHECKING:
    from phloem.client.call import Call
    from phloem.client.continuation import Continuation
    from phloem.server.chat.body import ChatBody
    from phloem.text.answer import AnswerEvent, AnswerParser
    from phloem.text.tokenizer import Tokenizer


class ChatMessage(Answer, kw_only=True):
    role: str
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, str] | UnsetType = UNSET  # where the request has `functions`


class ChatChoice(Answer, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    matched_stop: int | str | None
    hidden_states: list[float] | UnsetType = UNSET  # of the last output token
    token_ids: list[int] | UnsetType = UNSET  # where the request has `return_token_ids`
    prompt_token_ids: list[int] | UnsetType = UNSET  # with `return_prompt_token_ids`
    meta_info: dict[str, Any] | UnsetType = UNSET  # as in `/generate`; with `return_meta_info`


class ChatCompletion(Answer, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    sglext: Extensions | UnsetType = UNSET
    kv_transfer_params: dict[str, Any] | UnsetType = UNSET  # of a prefill server, for the decode server
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatDelta(Answer, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET
    function_call: dict[str, str] | UnsetType = UNSET


class ChatChunkChoice(Answer, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | UnsetType | None = UNSET
    hidden_states: list[float] | UnsetType = UNSET  # with the finish reason
    token_ids: list[int] | UnsetType = UNSET  # those that this chunk brings, also such as show no text yet
    prompt_token_ids: list[int] | UnsetType = UNSET  # with the first chunk; where the request has them
    meta_info: dict[str, Any] | UnsetType = UNSET  # with the finish reason; where the request has `return_meta_info`


class ChatChunk(Answer, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    sglext: Extensions | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET  # with the first chunk of a choice


@dataclass(slots=True)
class _Told:
    """Parser events in OpenAI's shape: texts joined, calls as deltas."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def _told(events: list[AnswerEvent]) -> _Told:
    told = _Told()
    for event in events:
        if isinstance(event, Text):
            told.content += event.text
        elif isinstance(event, Reasoning):
            told.reasoning += event.text
        elif isinstance(event, CallStart):
            function = {"name": event.name, "arguments": ""}
            told.calls.append({"index": event.index, "id": event.id, "type": "function", "function": function})
        else:
            if not told.calls or told.calls[-1]["index"] != event.index:
                told.calls.append({"index": event.index, "function": {"arguments": ""}})
            told.calls[-1]["function"]["arguments"] += event.text
    return told


def _whole(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a whole answer: a delta without its index."""
    return {name: value for name, value in call.items() if name != "index"}


class ChatWriter:
    """Writes one call's answer, whole or in chunks."""

    def __init__(
        self, body: ChatBody, key: str, model: str, tokenizer: Tokenizer | None, parsers: list[AnswerParser]
    ) -> None:
        self.body = body
        self.id = key
        self.model = model
        self.tokenizer = tokenizer
        self.parsers = parsers
        self.created = int(time.time())
        self._old = is_old(body)
        self._native = Renderer(GenerateBody(), None, prompts=False)

    def answer(self, outputs: list[Continuation]) -> ChatCompletion:
        choices: list[ChatChoice] = []
        for output in outputs:
            told = _told(self.parsers[output.choice].push(output.text, True, is_cut(output)))
            reason = output.finish.type if output.finish is not None else None
            message = ChatMessage(
                role="assistant",
                content=told.content if told.content or not told.calls else None,
                reasoning_content=told.reasoning or None,
                tool_calls=[_whole(call) for call in told.calls] or None,
            )
            if self._old and told.calls:
                message.tool_calls, message.function_call = None, told.calls[0]["function"]
            choices.append(
                ChatChoice(
                    index=output.choice,
                    message=message,
                    logprobs=self._logprobs(output, 0),
                    finish_reason=self._reason(bool(told.calls), reason),
                    matched_stop=matched_stop(output.finish),
                    hidden_states=last_hidden(output),
                    token_ids=ids_of(self.body, output),
                    prompt_token_ids=self._prompt_ids(output),
                    meta_info=self._meta(output),
                )
            )
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage_of(outputs),
            sglext=extensions_of(self.body, outputs),
            prompt_token_ids=prompt_ids_of(self.body, outputs[0]),
            prompt_logprobs=prompt_logprobs_of(self.body, outputs[0], self.tokenizer),
        )

    def events(self, call: Call) -> AsyncGenerator[bytes, None]:
        began: set[int] = set()
        called: set[int] = set()

        def chunks(output: Continuation) -> list[ChatChunk]:
            first = output.choice not in began
            made = [self._chunk([choice]) for choice in self._choices(output, began, called)]
            if first:
                made[0].prompt_token_ids = prompt_ids_of(self.body, output)
            return made

        def plain(output: Continuation, text: str) -> ChatChunk:
            return self._chunk([ChatChunkChoice(index=output.choice, delta=ChatDelta(content=text))])

        simple = all(isinstance(parser, PlainAnswer) for parser in self.parsers)
        more = self.body.return_token_ids or self.body.return_prompt_token_ids or self.body.return_meta_info
        simple = simple and not (self.body.logprobs or more)
        return stream_chunks(self.body, call, chunks, lambda: self._chunk([]), plain if simple else None)

    def _choices(self, output: Continuation, began: set[int], called: set[int]) -> list[ChatChunkChoice]:
        index, out = output.choice, list[ChatChunkChoice]()
        ids = ids_of(self.body, output, output.new_from)
        if index not in began:
            began.add(index)
            begin = ChatDelta(role="assistant", content="")
            out.append(ChatChunkChoice(index=index, delta=begin, prompt_token_ids=self._prompt_ids(output)))
        told = _told(self.parsers[index].push(output.delta, output.finish is not None, is_cut(output)))
        logprobs = self._logprobs(output, output.new_from)
        delta = ChatDelta()
        if told.reasoning:
            delta.reasoning_content = told.reasoning
        if told.calls:
            called.add(index)
            if self._old:
                delta.function_call = told.calls[0]["function"]
            else:
                delta.tool_calls = told.calls
        if told.content or (logprobs is not None and logprobs.content):
            delta.content = told.content
        if told.content or told.reasoning or told.calls or (logprobs and logprobs.content) or ids:
            out.append(ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, token_ids=ids))
        if output.finish is not None:
            reason = output.finish.type
            out.append(
                ChatChunkChoice(
                    index=index,
                    delta=ChatDelta(),
                    finish_reason=self._reason(index in called, reason),
                    matched_stop=matched_stop(output.finish),
                    hidden_states=last_hidden(output),
                    meta_info=self._meta(output),
                )
            )
        return out

    def _prompt_ids(self, output: Continuation) -> list[int] | UnsetType:
        return output.prompt_ids if self.body.return_prompt_token_ids else UNSET

    def _meta(self, output: Continuation) -> dict[str, Any] | UnsetType:
        """What `/generate` says of an output, log probabilities of its tokens by their ids among it."""
        return self._native.answer(output)["meta_info"] if self.body.return_meta_info else UNSET

    def _reason(self, called: bool, reason: str | None) -> str | None:
        if not called or reason != "stop":
            return reason
        return "function_call" if self._old else "tool_calls"

    def _logprobs(self, output: Continuation, begin: int) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(output, begin, self.body.top_logprobs or 0, names(self.body, self.tokenizer))

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices)
