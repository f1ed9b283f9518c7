"""Logprobs as `/generate` gives them: triples of logprob, token id, and text or null."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.messages import Logprobs
from phloem.protocol.logprobs import prompt_start

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.client.continuation import Continuation

Triple = tuple[float | None, int, str | None]  # logprob, token id, text
# logprob, token id, text
NativeTops = list[list[Triple] | None]


def native_triples(values: list[float], ids: list[int], text: Callable[[int], str] | None) -> list[Triple]:
    return [
        (value, token, text(token) if text is not None else None) for value, token in zip(values, ids, strict=False)
    ]


def native_pairs(rows: list[list[tuple[float, int]]], text: Callable[[int], str] | None) -> NativeTops:
    return [[(value, token, text(token) if text is not None else None) for value, token in row] for row in rows]


def native_prompt(output: Continuation, text: Callable[[int], str] | None) -> dict[str, list[Triple] | NativeTops]:
    """`input_*` lists, from `logprob_start` on. The prompt's first token has no logprob: null."""
    known = output.prompt_logprobs or Logprobs()
    wanted = max(output.item.logprob_start, 0)
    begin = prompt_start(output)
    blanks = (
        [output.prompt_ids[position] for position in range(wanted, begin)] if output.item.logprob_start >= 0 else []
    )
    skip = max(wanted - begin, 0)
    head: list[Triple] = [(None, token, text(token) if text is not None else None) for token in blanks]
    ids = output.prompt_ids[begin + skip :]
    found: dict[str, list[Triple] | NativeTops] = {
        "input_token_logprobs": head + native_triples(known.values[skip:], ids, text)
    }
    nothing: NativeTops = [None] * len(blanks)
    if output.item.top_logprobs:
        found["input_top_logprobs"] = nothing + native_pairs(known.top[skip:], text)
    if output.item.token_ids_logprob:
        found["input_token_ids_logprobs"] = nothing + native_pairs(known.chosen[skip:], text)
    return found
