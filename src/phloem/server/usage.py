"""What chat and text completions have in common on the way out: counts, finish reasons, extensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import UNSET, UnsetType

from phloem.protocol.answers import CachedTokensDetails, Extensions, PromptTokensDetails, Usage

if TYPE_CHECKING:
    from phloem.client.continuation import Continuation
    from phloem.core.request import FinishReason
    from phloem.protocol.fields import OpenAIBody


def usage_of(outputs: list[Continuation]) -> Usage:
    """Each prompt counts once, whatever its number of continuations."""
    prompts = {output.index: output for output in reversed(outputs)}.values()
    prompt = sum(output.prompt_tokens for output in prompts)
    completion = sum(output.completion_tokens for output in outputs)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(output.cached_tokens for output in prompts)),
    )


def extensions_of(body: OpenAIBody, outputs: list[Continuation]) -> Extensions | UnsetType:
    """`sglext`, where the request asks for what stands there."""
    if not body.return_cached_tokens_details:
        return UNSET
    prompts = {output.index: output for output in reversed(outputs)}.values()
    host, storage = sum(output.cached_host for output in prompts), sum(output.cached_storage for output in prompts)
    device = sum(output.cached_tokens for output in prompts) - host - storage
    return Extensions(cached_tokens_details=CachedTokensDetails(device=device, host=host, storage=storage or UNSET))


def matched_stop(finish: FinishReason | None) -> int | str | None:
    return None if finish is None else finish.matched


def is_cut(output: Continuation) -> bool:
    """Whether the answer has ended otherwise than by the model's own word."""
    return output.finish is not None and output.finish.type != "stop"


def last_hidden(output: Continuation) -> list[float] | UnsetType:
    """The state that the last output token was chosen from, where that was asked for."""
    if not output.item.return_hidden or not output.hidden:
        return UNSET
    return np.frombuffer(output.hidden[-1], dtype="<f4").tolist()
