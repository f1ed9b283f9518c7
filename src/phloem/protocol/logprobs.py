"""What the routes' forms of logprobs have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phloem.client.continuation import Continuation
    from phloem.text.tokenizer import Tokenizer


def prompt_start(output: Continuation) -> int:
    """The first prompt position that `prompt_logprobs.values` speaks of: they always reach to the prompt's end."""
    known = output.prompt_logprobs
    return output.prompt_tokens - (len(known.values) if known is not None else 0)


def text_and_bytes(tokenizer: Tokenizer | None, token: int) -> tuple[str, list[int] | None]:
    if tokenizer is None:
        return f"token_id:{token}", None
    return tokenizer.token_text(token), list(tokenizer.token_bytes(token)) or None
