"""Logprobs as each group of routes gives them, from the engine's numbers and the tokenizer's texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.messages import Logprobs
from phloem.server.answers import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.client.continuation import Continuation
    from phloem.text.tokenizer import Tokenizer

Triple = tuple[float | None, int, str | None]  # logprob, token id, text
NativeTops = list[list[Triple] | None]


def prompt_start(output: Continuation) -> int:
    """The first prompt position that `prompt_logprobs.values` speaks of: they always reach to the prompt's end."""
    known = output.prompt_logprobs
    return output.prompt_tokens - (len(known.values) if known is not None else 0)


# --- native: [logprob, token id, text or null]


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


# --- chat


def _text_and_bytes(tokenizer: Tokenizer | None, token: int) -> tuple[str, list[int] | None]:
    if tokenizer is None:
        return f"token_id:{token}", None
    return tokenizer.token_text(token), list(tokenizer.token_bytes(token)) or None


def chat_logprobs(output: Continuation, begin: int, end: int, tokenizer: Tokenizer | None) -> ChatLogprobs:
    """For output tokens `begin` to `end`."""
    content: list[TokenLogprob] = []
    known = output.logprobs
    for at in range(begin, min(end, len(known.values))):
        top: list[TopLogprob] = []
        for value, token in known.top[at] if at < len(known.top) else []:
            text, raw = _text_and_bytes(tokenizer, token)
            top.append(TopLogprob(token=text, logprob=value, bytes=raw))
        text, raw = _text_and_bytes(tokenizer, output.ids[at])
        content.append(TokenLogprob(token=text, logprob=known.values[at], bytes=raw, top_logprobs=top))
    return ChatLogprobs(content=content)


# --- completions


class TextOffsets:
    """Where the tokens of one continuation begin in its text, behind `prompt`: in characters, chunk after chunk.

    A token without text of its own (special, or bytes of an unfinished character) begins where the next text does.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: str, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._at = len(prompt)
        self._decoder = tokenizer.stream(skip_special) if tokenizer is not None else None

    def of_prompt(self, ids: list[int]) -> list[int]:
        if self._tokenizer is None:
            return [0] * len(ids)
        # A prompt that came as text may spell special tokens; one that was decoded shows none.
        written = self._tokenizer.decode(ids, skip_special_tokens=False)
        spelled = written.endswith(self._prompt)
        decoder = self._tokenizer.stream(not spelled)
        found, at = list[int](), len(self._prompt) - len(written) if spelled else 0
        for token in ids:
            found.append(max(0, min(at, len(self._prompt))))
            at += len(decoder.push(token))
        return found

    def of_output(self, ids: list[int]) -> list[int]:
        found: list[int] = []
        for token in ids:
            found.append(self._at)
            self._at += len(self._decoder.push(token)) if self._decoder is not None else 0
        return found


def completion_logprobs(
    output: Continuation, begin: int, end: int, echo: bool, offsets: TextOffsets, tokenizer: Tokenizer | None
) -> CompletionLogprobs:
    """For output tokens `begin` to `end`, behind those of the whole prompt with `echo`."""
    ids, values = output.ids[begin:end], list[float | None](output.logprobs.values[begin:end])
    tops: list[list[tuple[float, int]] | None] = [*output.logprobs.top[begin:end]]
    places = offsets.of_output(ids)
    if echo:
        known = output.prompt_logprobs or Logprobs()
        blanks = prompt_start(output)
        ids = output.prompt_ids + ids
        places = offsets.of_prompt(output.prompt_ids) + places
        values = [None] * blanks + known.values + values
        tops = [None] * blanks + (known.top or [None] * len(known.values)) + tops
    tokens = [_text_and_bytes(tokenizer, token)[0] for token in ids]
    named: list[dict[str, float] | None] | None = None
    if output.item.top_logprobs:
        named = [
            None if row is None else {_text_and_bytes(tokenizer, token)[0]: value for value, token in row}
            for row in tops
        ]
    return CompletionLogprobs(tokens=tokens, token_logprobs=values, top_logprobs=named, text_offset=places)
