"""Which custom logit processors a request asks for, by name; nothing that a client sends is executed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest
from phloem.engine import processors
from phloem.grammar._thinking import CLOSED, OPEN, ThinkingMarkers, state_after
from phloem.text.formats import THINKING

if TYPE_CHECKING:
    from phloem.client.info import ModelInfo
    from phloem.text.tokenizer import Tokenizer

THINKING_BUDGET = "thinking_budget"


def named(name: str | None, params: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """`SamplingParams.processors` for `custom_logit_processor` and its `custom_params`.

    Raises:
        BadRequest: no such processor (serialised code is not taken), or parameters without a name.
    """
    if not name:
        if params:
            raise BadRequest("custom_params need a custom_logit_processor", param="custom_params")
        return {}
    known = processors.PROCESSORS.names()
    if name not in known:
        hint = "; serialised code is never executed" if name.lstrip().startswith("{") else ""
        message = f"custom_logit_processor: unknown name {name!r:.100}; known: {', '.join(known)}{hint}"
        raise BadRequest(message, param="custom_logit_processor")
    return {name: params or {}}


def thinking_budget(
    limit: int, prompt: list[int], tokenizer: Tokenizer | None, info: ModelInfo
) -> dict[str, dict[str, Any]]:
    """The processor that closes a reasoning block after `limit` tokens; none where the prompt has closed it already.

    Raises:
        BadRequest: a negative limit, or a model whose reasoning format is not known.
    """
    where = "max_thinking_tokens"
    if limit < 0:
        raise BadRequest(f"{where} must be at least 0, got {limit}", param=where)
    if info.reasoning_parser is None or tokenizer is None:
        raise BadRequest(f"{where}: this model has no known reasoning format", param=where)
    kind = THINKING.get(info.reasoning_parser)
    start, end = (tokenizer.encode(text, add_special_tokens=False) for text in (kind.start, kind.end))
    if not start or not end:
        raise BadRequest(f"{where}: the format {info.reasoning_parser!r} has no markers", param=where)
    if len(end) > 1 and not tokenizer.is_special(end[0]):
        # Text beside it may be merged into such a marker: where the block ends could not be told by tokens.
        raise BadRequest(f"{where}: the tokenizer has no token for {kind.end!r}", param=where)
    state = state_after(prompt, ThinkingMarkers(tuple(start), tuple(end), kind.always))
    if state == CLOSED:
        return {}
    inside = state == OPEN
    params: dict[str, Any] = {"thinking_budget": limit, "end_ids": end, "inside": inside}
    return {THINKING_BUDGET: params if inside else {**params, "start_ids": start}}
