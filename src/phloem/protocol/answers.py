"""Response bodies: encoded with msgspec on the hot path, and the source of the OpenAPI document's answer schemas.

UNSET fields are left out; None is sent as null where clients expect the key.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class Answer(msgspec.Struct, kw_only=True):
    """Base of response bodies."""


class Error(Answer, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None
    object: Literal["error"] = "error"
    retryable: bool = False


class ErrorAnswer(Answer, kw_only=True):
    """Every error, on every route; in a stream, the data of one event."""

    error: Error


class PromptTokensDetails(Answer, kw_only=True):
    cached_tokens: int = 0


class Usage(Answer, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CachedTokensDetails(Answer, kw_only=True):
    """Where the cached tokens of the prompts were found."""

    device: int = 0
    host: int = 0


class Extensions(Answer, kw_only=True):
    """What clients of this engine's family ask for beside OpenAI's fields."""

    cached_tokens_details: CachedTokensDetails


class TopLogprob(Answer, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Answer, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer, kw_only=True):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(Answer, kw_only=True):
    role: str
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ParsedCalls(Answer, kw_only=True):
    """`calls`: tool_index, name and parameters (a JSON text)."""

    normal_text: str
    calls: list[dict[str, Any]]


class SeparatedReasoning(Answer, kw_only=True):
    reasoning_text: str
    text: str


class ChatChoice(Answer, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    matched_stop: int | str | None
    hidden_states: list[float] | UnsetType = UNSET  # of the last output token


class ChatCompletion(Answer, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    sglext: Extensions | UnsetType = UNSET


class ChatDelta(Answer, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET


class ChatChunkChoice(Answer, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | UnsetType | None = UNSET
    hidden_states: list[float] | UnsetType = UNSET  # with the finish reason


class ChatChunk(Answer, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    sglext: Extensions | UnsetType = UNSET


class CompletionLogprobs(Answer, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Answer, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    matched_stop: int | str | UnsetType | None = UNSET
    hidden_states: list[float] | UnsetType = UNSET  # of the last output token


class Completion(Answer, kw_only=True):
    """Also each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    sglext: Extensions | UnsetType = UNSET


class ModelCard(Answer, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "phloem"
    root: str
    max_model_len: int


class ModelList(Answer, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class FinishReasonAnswer(Answer, kw_only=True):
    type: Literal["stop", "length", "abort"]
    matched: int | str | UnsetType | None = UNSET
    length: int | UnsetType = UNSET
    message: str | UnsetType | None = UNSET
    status_code: int | UnsetType | None = UNSET


class GenerateAnswer(Answer, kw_only=True):
    """One item of `/generate`; a batch answers with a list of these."""

    text: str
    output_ids: list[int]
    meta_info: dict[str, Any]
    index: int | UnsetType = UNSET


class TokenizeAnswer(Answer, kw_only=True):
    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int


class DetokenizeAnswer(Answer, kw_only=True):
    text: str | list[str]


class Status(Answer, kw_only=True):
    status: str


class ControlAnswer(Answer, kw_only=True):
    success: bool
    message: str


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


class ScoreAnswer(Answer, kw_only=True):
    """One list per item: a score per label token."""

    scores: list[list[float]]
    model: str
    usage: Usage
    object: Literal["scoring"] = "scoring"
