"""Request body of `/v1/completions`."""

from __future__ import annotations

from typing import ClassVar

from phloem.protocol.fields import Int32, OpenAIBody


class CompletionBody(OpenAIBody, kw_only=True):
    """`POST /v1/completions`. The prompt is a string, token ids, or a list of either."""

    pooled: ClassVar[bool | None] = False
    prompt: str | list[str | Int32 | list[Int32]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Int32 | None = None
    best_of: Int32 | None = None
