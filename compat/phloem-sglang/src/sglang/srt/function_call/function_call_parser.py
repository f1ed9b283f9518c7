"""Tool calls in a model's text, by Phloem's formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from phloem.text import formats
from phloem.text.tools._base import CallStart, Text, ToolParser
from sglang._missing import missing
from sglang.srt.function_call.core_types import ToolCallItem


class FunctionCallParser:
    """As SGLang's; `tool_call_parser` is the name of a format, by any spelling that Phloem knows.

    Raises:
        phloem.core.errors.ConfigError: an unknown format; the known ones are listed.
    """

    ToolCallParserEnum: dict[str, Any] = {name: name for name in formats.TOOLS.names()}

    def __init__(self, tools: Iterable[Any], tool_call_parser: str) -> None:
        self.tools = list(tools)
        self._form = formats.TOOLS.module(formats.tool_format(tool_call_parser)).Parser
        self._stream = self._parser()

    def _parser(self) -> ToolParser:
        return self._form([tool.model_dump() if isinstance(tool, BaseModel) else tool for tool in self.tools])

    def has_tool_call(self, text: str) -> bool:
        return bool(self._parser().parse(text).calls)

    def parse_non_stream(self, full_text: str) -> tuple[str, list[ToolCallItem]]:
        """The plain text and the calls of a whole answer."""
        found = self._parser().parse(full_text)
        calls = enumerate(found.calls)
        return found.text, [ToolCallItem(tool_index=at, name=one.name, parameters=one.arguments) for at, one in calls]

    def parse_stream_chunk(self, chunk_text: str) -> tuple[str, list[ToolCallItem]]:
        """What a piece brings: text, calls that begin (with a name), and pieces of their arguments."""
        text, calls = "", list[ToolCallItem]()
        for event in self._stream.push(chunk_text):
            if isinstance(event, Text):
                text += event.text
            elif isinstance(event, CallStart):
                calls.append(ToolCallItem(tool_index=event.index, name=event.name, parameters=""))
            else:
                calls.append(ToolCallItem(tool_index=event.index, parameters=event.text))
        return text, calls


__getattr__ = missing(__name__)
