"""What a tool-call parser gives."""

from __future__ import annotations

from pydantic import BaseModel

from sglang._missing import missing


class ToolCallItem(BaseModel):
    """`tool_index`: which call of the answer; `parameters`: a JSON text, or a piece of it in a stream."""

    tool_index: int
    name: str | None = None
    parameters: str


class StreamingParseResult(BaseModel):
    normal_text: str = ""
    calls: list[ToolCallItem] = []


__getattr__ = missing(__name__)
