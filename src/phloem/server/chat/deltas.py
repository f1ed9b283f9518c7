"""What a model's text means: reasoning, content and tool calls, in OpenAI's delta shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from phloem.text.formats import THINKING
from phloem.text.tools._base import Arguments, CallStart, Text

if TYPE_CHECKING:
    from phloem.server.chat.toolplan import ToolPlan
    from phloem.text.thinking._base import ThinkingParser
    from phloem.text.tokenizer import Tokenizer
    from phloem.text.tools._base import Event, ToolParser


@dataclass(slots=True)
class ParsedDelta:
    """What a stretch of output text means: plain content, reasoning, tool calls (in OpenAI's delta shape)."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


class DeltaParser(Protocol):
    """One continuation's parser. `push` gets each text delta once, in order; `last` with the final one."""

    def push(self, text: str, last: bool) -> ParsedDelta: ...


class PlainText:
    """All of the text is content."""

    def push(self, text: str, last: bool) -> ParsedDelta:
        return ParsedDelta(content=text)


class AnswerParser:
    """Reasoning first, tool calls in what is left.

    Args:
        stream_reasoning: False: the reasoning comes in one piece when its block has ended.
        parallel: False: calls after the first are left out.
    """

    def __init__(
        self,
        thinking: ThinkingParser | None,
        tools: ToolParser | None,
        stream_reasoning: bool = True,
        parallel: bool = True,
    ) -> None:
        self._thinking = thinking
        self._tools = tools
        self._stream_reasoning = stream_reasoning
        self._parallel = parallel
        self._reasoning = ""

    def push(self, text: str, last: bool) -> ParsedDelta:
        reasoning, content = "", text
        if self._thinking is not None:
            reasoning, content = self._thinking.push(text)
            if last:
                more = self._thinking.finish()
                reasoning, content = reasoning + more[0], content + more[1]
            if not self._stream_reasoning:
                reasoning = self._gathered(reasoning, last)
        delta = ParsedDelta(reasoning_content=reasoning)
        if self._tools is None:
            delta.content = content
            return delta
        self._add(delta, self._tools.push(content))
        if last:
            self._add(delta, self._tools.finish())
        return delta

    def _gathered(self, reasoning: str, last: bool) -> str:
        self._reasoning += reasoning
        if self._thinking is not None and self._thinking.inside and not last:
            return ""
        whole, self._reasoning = self._reasoning, ""
        return whole

    def _add(self, delta: ParsedDelta, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Text):
                delta.content += event.text
            elif not self._parallel and event.index > 0:
                continue
            elif isinstance(event, CallStart):
                function: dict[str, Any] = {"name": event.name, "arguments": ""}
                delta.tool_calls.append(
                    {"index": event.index, "id": event.id, "type": "function", "function": function}
                )
            else:
                _append(delta.tool_calls, event)


def _append(calls: list[dict[str, Any]], event: Arguments) -> None:
    if not calls or calls[-1]["index"] != event.index:
        calls.append({"index": event.index, "function": {"arguments": ""}})
    calls[-1]["function"]["arguments"] += event.text


def answer_parsers(
    count: int,
    plan: ToolPlan,
    reasoning: str | None,
    prompt: str,
    stream_reasoning: bool = True,
    continued: str | None = None,
) -> list[DeltaParser]:
    """One parser for each continuation of this prompt.

    `reasoning` is the format's name (None: not parted); `continued` is the answer as the prompt begins it.
    """
    if reasoning is None and not plan.tools:
        return [PlainText() for _ in range(count)]
    return [
        AnswerParser(thinking_parser(reasoning, prompt, continued), plan.parser(), stream_reasoning, plan.parallel)
        for _ in range(count)
    ]


def thinking_parser(name: str | None, prompt: str, continued: str | None = None) -> ThinkingParser | None:
    """A reasoning parser that knows whether the prompt ends inside a block."""
    if name is None:
        return None
    kind = THINKING.get(name)
    state = continued_state(continued, kind.start, kind.end) if continued is not None else None
    return kind(state if state is not None else block_state(prompt, kind.start, kind.end))


def block_state(prompt: str, start: str, end: str) -> bool | None:
    """True: the prompt leaves a block open; False: it has just closed one; None: it says nothing."""
    tail = prompt.rstrip()
    if tail.endswith(start):
        return True
    if tail.endswith(end):
        return False
    return None


def continued_state(text: str, start: str, end: str) -> bool | None:
    """As `block_state`, for an answer that is being continued."""
    opened, closed = text.rfind(start), text.rfind(end)
    if opened < 0 and closed < 0:
        return None
    return opened > closed


def needs_special_tokens(tokenizer: Tokenizer | None, plan: ToolPlan, reasoning: str | None) -> bool:
    """Whether the formats are marked by special tokens, which must then not be left out of the text."""
    if tokenizer is None:
        return False
    markers: set[str] = set()
    parser = plan.parser()
    if parser is not None:
        markers.update(parser.begins)
    if reasoning is not None:
        kind = THINKING.get(reasoning)
        markers.update((kind.start, kind.end, *kind.jumps))
    return any(_is_special(tokenizer, marker) for marker in markers)


def _is_special(tokenizer: Tokenizer, marker: str) -> bool:
    return any(tokenizer.is_special(token) for token in tokenizer.encode(marker, add_special_tokens=False))
