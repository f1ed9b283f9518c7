"""Where the grammar of an answer begins, when the model may reason first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.errors import BadRequest
from phloem.core.messages import Thinking
from phloem.grammar._base import field_of
from phloem.server.parsers import THINKING
from phloem.server.parsing import block_state, continued_state

if TYPE_CHECKING:
    from phloem.server.info import ModelInfo
    from phloem.server.request import Item
    from phloem.server.tokenizer import Tokenizer

_TAIL = 64  # last tokens of a prompt given as ids: enough for the marker of a block that it opens


def thinking_gate(name: str, tokenizer: Tokenizer, prompt: str, continued: str | None = None) -> Thinking | None:
    """What a constrained answer in this reasoning format must wait for; None: nothing, it begins at once.

    `prompt` is its text (the end suffices); `continued` the answer as the prompt begins it.
    """
    kind = THINKING.module(name).Parser
    state = continued_state(continued, kind.start, kind.end) if continued is not None else None
    if state is None:
        state = block_state(prompt, kind.start, kind.end)
    if state is False and kind.answer is None:
        return None
    marker = kind.answer or kind.end
    end = tokenizer.encode(marker, add_special_tokens=False)
    return Thinking(
        opened=state is True or kind.always or kind.answer is not None,
        start=tokenizer.encode(kind.start, add_special_tokens=False),
        end=end,
        # One special token is itself wherever it stands; a marker of several may be split in other ways in its place.
        end_text=marker if len(end) > 1 and not any(tokenizer.is_special(token) for token in end) else "",
    )


def resolve_thinking(item: Item, tokenizer: Tokenizer | None, info: ModelInfo) -> None:
    """Fill in `item.thinking` for a constrained item that asks for reasoning.

    Raises:
        BadRequest: if the model has no reasoning format.
    """
    if not item.reasoning or field_of(item.sampling) is None:
        return
    if info.reasoning_parser is None or tokenizer is None:
        raise BadRequest("this model has no known reasoning format", param="require_reasoning")
    tail = (
        item.text if item.text is not None else tokenizer.decode((item.ids or [])[-_TAIL:], skip_special_tokens=False)
    )
    item.thinking = thinking_gate(info.reasoning_parser, tokenizer, tail, item.continued)
