"""Logprobs as `/v1/completions` gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.messages import Logprobs
from phloem.protocol.answers import Answer
from phloem.protocol.logprobs import prompt_start, text_and_bytes

if TYPE_CHECKING:
    from phloem.client.continuation import Continuation
    from phloem.text.tokenizer import Tokenizer


class CompletionLogprobs(Answer, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


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
    output: Continuation, begin: int, top: int, echo: bool, offsets: TextOffsets, tokenizer: Tokenizer | None
) -> CompletionLogprobs:
    """For output tokens from `begin` on, behind those of the whole prompt with `echo`; `top`: so many of the likeliest.

    Without a tokenizer tokens are `token_id:N`.
    """
    end = len(output.ids)
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
    tokens = [text_and_bytes(tokenizer, token)[0] for token in ids]
    named: list[dict[str, float] | None] | None = None
    if top:
        named = [None if row is None else _best_by_text(row[:top], tokenizer) for row in tops]
    elif tokenizer is None:  # clients of vLLM, which tells the token itself where no others are asked for
        named = [None if value is None else {token: value} for token, value in zip(tokens, values, strict=True)]
    return CompletionLogprobs(tokens=tokens, token_logprobs=values, top_logprobs=named, text_offset=places)


def _best_by_text(row: list[tuple[float, int]], tokenizer: Tokenizer | None) -> dict[str, float]:
    """Tokens of equal text (bytes of unfinished characters) share a key: the likeliest has it."""
    found: dict[str, float] = {}
    for value, token in row:
        text = text_and_bytes(tokenizer, token)[0]
        found[text] = max(value, found.get(text, value))
    return found
