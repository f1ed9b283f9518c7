"""Bodies of the OpenAI API, as far as callers build them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sglang._missing import missing


class Function(BaseModel):
    description: str | None = None
    name: str | None = None
    parameters: Any = None
    strict: bool = False


class Tool(BaseModel):
    type: str = "function"
    function: Function


class FunctionResponse(BaseModel):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: FunctionResponse


class ChatCompletionRequest(BaseModel):
    """What is not named here is kept as it is: the server checks it."""

    model_config = ConfigDict(extra="allow")
    messages: list[Any]
    model: str = "default"
    tools: list[Tool] | None = None
    tool_choice: Any = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int = 1
    stop: str | list[str] | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


__getattr__ = missing(__name__)
