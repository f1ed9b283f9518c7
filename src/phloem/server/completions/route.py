"""`POST /v1/completions`: prompts as text or token ids, single or several; `echo` and `logprobs`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.request import GenerateRequest, Item, new_id
from phloem.core.errors import BadRequest
from phloem.server.answers import Completion, CompletionChoice, CompletionLogprobs
from phloem.server.body import Parser
from phloem.server.door import door_of, json_response
from phloem.server.generate.convert import split_ids
from phloem.server.logprobs import TextOffsets, completion_logprobs
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.protocol import CompletionBody
from phloem.server.sampling import namespace, openai_params
from phloem.server.stream import collect, stream
from phloem.server.usage import extensions_of, last_hidden, matched_stop, stream_chunks, usage_of
from phloem.text import infill

if TYPE_CHECKING:
    from phloem.client.call import Call
    from phloem.client.continuation import Continuation
    from phloem.text.tokenizer import Tokenizer

router = APIRouter(tags=["openai"])
_parser = Parser(CompletionBody)
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post(
    "/v1/completions",
    **describe(body=CompletionBody, answer=Completion, streams=True, errors=(404, *NEEDS_ENGINE)),
)
async def completions(request: Request) -> Response:
    """Continue a text, or several."""
    door = door_of(request)
    body = await door.read(request, _parser)
    door.check_model(body.model)
    asked = to_request(body, door.client.tokenizer)
    door.check_batch(asked)
    call = await door.client.submit(asked)
    writer = _Writer(body, body.rid or new_id("cmpl-"), door.info.served_model_name, door.client.tokenizer)
    if asked.stream:
        return await stream(request, call, writer.events(call))
    return json_response(writer.answer(await collect(request, call)))


def to_request(body: CompletionBody, tokenizer: Tokenizer | None) -> GenerateRequest:
    """Raises BadRequest where fields do not fit together."""
    prompts = _prompts(body)
    shown = _shown(body)
    if body.suffix:
        if body.echo:
            raise BadRequest("echo and suffix exclude each other", param="suffix")
        prompts = [infill.prompt(tokenizer, prompt, body.suffix) for prompt in prompts]
    wants = body.logprobs is not None
    echo = bool(body.echo)
    params = openai_params(body, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens)
    params.n = max(shown, body.best_of or 0)
    rid = body.rid or new_id()
    items = [
        Item(
            sampling=params,
            text=prompt if isinstance(prompt, str) else None,
            ids=prompt if isinstance(prompt, list) else None,
            id=rid if len(prompts) == 1 else f"{rid}-{at}",
            return_logprob=wants or params.n > shown,  # the best ones are told by their logprobs
            logprob_start=0 if wants and echo else -1,
            top_logprobs=body.logprobs or 0,
            priority=body.priority or 0,
            namespace=namespace(body.cache_salt, body.extra_key),
            return_hidden=bool(body.return_hidden_states),
            session=body.session_params.step() if body.session_params is not None else None,
        )
        for at, prompt in enumerate(prompts)
    ]
    return GenerateRequest(items, bool(body.stream))


def _shown(body: CompletionBody) -> int:
    """How many continuations of each prompt are answered with: `n`, the best of `best_of`."""
    shown = 1 if body.n is None else body.n
    if body.best_of:
        if body.best_of < shown:
            raise BadRequest(f"best_of ({body.best_of}) is below n ({shown})", param="best_of")
        if body.best_of > shown and body.stream:
            raise BadRequest("best_of above n cannot be streamed", param="best_of")
    return shown


def _best(outputs: list[Continuation], shown: int) -> list[Continuation]:
    """Of each prompt the continuations with the highest logprob per token, best first."""
    found: list[Continuation] = []
    for index in sorted({output.index for output in outputs}):
        several = [output for output in outputs if output.index == index]
        several.sort(key=lambda output: -sum(output.logprobs.values) / max(1, len(output.logprobs.values)))
        found += several[:shown]
    return found


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    texts: list[str | list[int]] = [item for item in prompt if isinstance(item, str)]
    if texts and len(texts) < len(prompt):
        raise BadRequest("prompt mixes texts and token ids", param="prompt")
    found = texts or [*split_ids([item for item in prompt if not isinstance(item, str)], "prompt")]
    if not prompt:
        raise BadRequest("the list of prompts is empty", param="prompt")
    return found


class _Writer:
    """Writes one call's answer, whole or in chunks."""

    def __init__(self, body: CompletionBody, key: str, model: str, tokenizer: Tokenizer | None) -> None:
        self.body = body
        self.id = key
        self.model = model
        self.tokenizer = tokenizer
        self.created = int(time.time())

    def answer(self, outputs: list[Continuation]) -> Completion:
        choices: list[CompletionChoice] = []
        shown = _shown(self.body)
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

        simple = plain if self.body.logprobs is None else None
        return stream_chunks(self.body, call, chunks, lambda: self._chunk([]), simple)

    def _choice(self, output: Continuation, index: int, offsets: dict[str, TextOffsets]) -> CompletionChoice | None:
        first = output.id not in offsets
        prompt = self._prompt_text(output) if first else ""
        if first:
            offsets[output.id] = self._offsets(output, prompt)
        text = prompt + output.delta
        logprobs = self._logprobs(output, output.new_from, first, offsets[output.id])
        if not text and output.finish is None and (logprobs is None or not logprobs.tokens):
            return None
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=None)
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

    def _logprobs(self, output: Continuation, begin: int, first: bool, offsets: TextOffsets) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        echo = first and bool(self.body.echo)
        return completion_logprobs(output, begin, len(output.ids), echo, offsets, self.tokenizer)

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices)
