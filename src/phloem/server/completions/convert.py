"""From a `/v1/completions` body to a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.client.request import GenerateRequest, Item, new_id
from phloem.core.errors import BadRequest
from phloem.protocol.fields import dp_rank
from phloem.protocol.generate.convert import split_ids
from phloem.protocol.promises import promise
from phloem.protocol.rooms import place
from phloem.protocol.sampling import namespace, openai_names, openai_params
from phloem.server import token_ids
from phloem.text import infill

if TYPE_CHECKING:
    from phloem.server.completions.body import CompletionBody
    from phloem.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
# OpenAI's


def to_request(body: CompletionBody, tokenizer: Tokenizer | None) -> GenerateRequest:
    """Raises BadRequest where fields do not fit together."""
    prompts = _prompts(body)
    shown = shown_of(body)
    if body.suffix:
        if body.echo:
            raise BadRequest("echo and suffix exclude each other", param="suffix")
        prompts = [infill.prompt(tokenizer, prompt, body.suffix) for prompt in prompts]
    token_ids.check(body)
    token_ids.bounded("logprobs", body.logprobs)
    wants, of_prompt = body.logprobs is not None, body.prompt_logprobs is not None
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
            return_logprob=wants or of_prompt or params.n > shown,  # the best ones are told by their logprobs
            logprob_start=0 if of_prompt or (wants and echo) else -1,
            top_logprobs=max(body.logprobs or 0, body.prompt_logprobs or 0),
            priority=body.priority or 0,
            namespace=namespace(body.cache_salt, body.extra_key),
            return_hidden=bool(body.return_hidden_states),
            dp_rank=dp_rank(body),
            session=body.session_params.step() if body.session_params is not None else None,
            names=openai_names("max_tokens", "prompt_logprobs" if of_prompt else "echo"),
        )
        for at, prompt in enumerate(prompts)
    ]
    place(items, body)
    promise(items, body)
    return GenerateRequest(items, bool(body.stream))


def shown_of(body: CompletionBody) -> int:
    """How many continuations of each prompt are answered with: `n`, the best of `best_of`."""
    shown = 1 if body.n is None else body.n
    if body.best_of:
        if body.best_of < shown:
            raise BadRequest(f"best_of ({body.best_of}) is below n ({shown})", param="best_of")
        if body.best_of > shown and body.stream:
            raise BadRequest("best_of above n cannot be streamed", param="best_of")
    return shown


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
