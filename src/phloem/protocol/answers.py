"""Response bodies that several routes share. Encoded with msgspec, and the source of the OpenAPI document's schemas.

UNSET fields are left out; None is sent as null where clients expect the key. Those of one API stand in its `write.py`.
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


class MessagesError(Answer, kw_only=True):
    type: str
    message: str
    details: dict[str, Any] | UnsetType = UNSET


class MessagesErrorAnswer(Answer, kw_only=True):
    """Every error on the routes under `/v1/messages`; in a stream, the data of the event `error`."""

    type: Literal["error"] = "error"
    error: MessagesError
    request_id: str | None = None


class PromptTokensDetails(Answer, kw_only=True):
    cached_tokens: int = 0


class Usage(Answer, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CachedTokensDetails(Answer, kw_only=True):
    """Where the cached tokens of the prompts were found. `storage`: told where a store had any."""

    device: int = 0
    host: int = 0
    storage: int | UnsetType = UNSET


class Extensions(Answer, kw_only=True):
    """What clients of this engine's family ask for beside OpenAI's fields."""

    cached_tokens_details: CachedTokensDetails


class Status(Answer, kw_only=True):
    status: str


class ControlAnswer(Answer, kw_only=True):
    success: bool
    message: str
