"""Answers of `/v1/completions`, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Literal

from msgspec import UNSET, UnsetType

from phloem.protocol.answers import Answer, Extensions, Usage
from phloem.server.chunks import stream_chunks
from phloem.server.completions.convert import shown_of
from phloem.server.completions.logprobs import CompletionLogprobs, TextOffsets, completion_logprobs
from phloem.server.token_ids import PromptLogprobs, ids_of, names, prompt_ids_of, prompt_logprobs_of
from phloem.server.usage import extensions_of, last_hidden, matched_stop, usage_of

if TYPE_CHECKING:
    from phloem.client.call import Call
    from phloem.client.continuation import Continuation
    from phloem.server.completions.body import CompletionBody
    from phloem.text.tokenizer import Tokenizer


class CompletionChoice(Answer, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    matched_stop: int | str | UnsetType | None = UNSET
    hidden_states: list[float] | UnsetType = UNSET  # of the last output token
    token_ids: list[int] | UnsetType = UNSET  # where the request has `return_token_ids`; of a chunk: its own
    prompt_token_ids: list[int] | UnsetType = UNSET  # of a stream: with the first chunk
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Answer, kw_only=True):
    """Also each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    sglext: Extensions | UnsetType = UNSET


class CompletionWriter:
    """Writes one call's answer, whole or in chunks."""

    def __init__(self, body: CompletionBody, key: str, model: str, tokenizer: Tokenizer | None) -> None:
        self.body = body
        self.id = key
        self.model = model
        self.tokenizer = tokenizer
        self.created = int(time.time())

    def answer(self, outputs: list[Continuation]) -> Completion:
        choices: list[CompletionChoice] = []
        shown = shown_of(self.body)
        best = outputs if (self.body.best_of or 0) <= shown else _best(outputs, shown)
        for at, output in enumerate(best):
            prompt = self._prompt_text(output)
            choices.append(
                CompletionChoice(
                    index=at,
                    text=prompt + output.text,
                    logprobs=self._logprobs(output, 0, True, self._offsets(output, prompt)),
                    finish_reason=output.finish.type if output.finish is not None else None,
                    matched_stop=matched_stop(output.finish),
                    hidden_states=last_hidden(output),
                    token_ids=ids_of(self.body, output),
                    prompt_token_ids=prompt_ids_of(self.body, output),
                    prompt_logprobs=prompt_logprobs_of(self.body, output, self.tokenizer),
                )
            )
        answer = self._chunk(choices)
        answer.usage = usage_of(outputs)
        answer.sglext = extensions_of(self.body, outputs)
        return answer

    def events(self, call: Call) -> AsyncGenerator[bytes, None]:
        numbers = {output.id: at for at, output in enumerate(call.outputs)}
        offsets: dict[str, TextOffsets] = {}

        def chunks(output: Continuation) -> list[Completion]:
            choice = self._choice(output, numbers[output.id], offsets)
            return [] if choice is None else [self._chunk([choice])]

        def plain(output: Continuation, text: str) -> Completion:
            choice = CompletionChoice(index=numbers[output.id], text=text, logprobs=None, finish_reason=None)
            return self._chunk([choice])

        simple = plain if self.body.logprobs is None and not self.body.return_token_ids else None
        return stream_chunks(self.body, call, chunks, lambda: self._chunk([]), simple)

    def _choice(self, output: Continuation, index: int, offsets: dict[str, TextOffsets]) -> CompletionChoice | None:
        first = output.id not in offsets
        prompt = self._prompt_text(output) if first else ""
        if first:
            offsets[output.id] = self._offsets(output, prompt)
        text = prompt + output.delta
        logprobs = self._logprobs(output, output.new_from, first, offsets[output.id])
        ids = ids_of(self.body, output, output.new_from)
        if not text and output.finish is None and (logprobs is None or not logprobs.tokens) and not ids:
            return None
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=None, token_ids=ids)
        if first:
            choice.prompt_token_ids = prompt_ids_of(self.body, output)
        if output.finish is not None:
            choice.finish_reason = output.finish.type
            choice.matched_stop = matched_stop(output.finish)
            choice.hidden_states = last_hidden(output)
        return choice

    def _prompt_text(self, output: Continuation) -> str:
        if not self.body.echo:
            return ""
        if output.item.text is not None and output.item.session is None:
            return output.item.text
        return self.tokenizer.decode(output.prompt_ids) if self.tokenizer is not None else ""

    def _offsets(self, output: Continuation, prompt: str) -> TextOffsets:
        return TextOffsets(self.tokenizer, prompt, output.params.skip_special_tokens)

    def _logprobs(
        self, output: Continuation, begin: int, first: bool, offsets: TextOffsets
    ) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        echo = first and bool(self.body.echo)
        return completion_logprobs(output, begin, self.body.logprobs, echo, offsets, names(self.body, self.tokenizer))

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices)


def _best(outputs: list[Continuation], shown: int) -> list[Continuation]:
    """Of each prompt the continuations with the highest logprob per token, best first."""
    found: list[Continuation] = []
    for index in sorted({output.index for output in outputs}):
        several = [output for output in outputs if output.index == index]
        several.sort(key=lambda output: -sum(output.logprobs.values) / max(1, len(output.logprobs.values)))
        found += several[:shown]
    return found
