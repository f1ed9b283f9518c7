"""Logprobs as `/v1/chat/completions` and `/v1/responses` give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.protocol.answers import Answer
from phloem.protocol.logprobs import text_and_bytes

if TYPE_CHECKING:
    from phloem.client.continuation import Continuation
    from phloem.text.tokenizer import Tokenizer


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


def chat_logprobs(output: Continuation, begin: int, most: int, tokenizer: Tokenizer | None) -> ChatLogprobs:
    """For output tokens from `begin` on; `most`: so many of the likeliest. Without a tokenizer: `token_id:N`."""
    end = len(output.ids)
    content: list[TokenLogprob] = []
    known = output.logprobs
    for at in range(begin, min(end, len(known.values))):
        top: list[TopLogprob] = []
        for value, token in known.top[at][:most] if at < len(known.top) else []:
            text, raw = text_and_bytes(tokenizer, token)
            top.append(TopLogprob(token=text, logprob=value, bytes=raw))
        text, raw = text_and_bytes(tokenizer, output.ids[at])
        content.append(TokenLogprob(token=text, logprob=known.values[at], bytes=raw, top_logprobs=top))
    return ChatLogprobs(content=content)
