"""Token ids in answers of the OpenAI routes, by vLLM's names: `return_token_ids`, `prompt_logprobs` and their kin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from phloem.client.admission import MAX_TOP_LOGPROBS
from phloem.core.errors import BadRequest
from phloem.core.messages import Logprobs
from phloem.protocol.answers import Answer
from phloem.protocol.logprobs import prompt_start, text_and_bytes

if TYPE_CHECKING:
    from phloem.client.continuation import Continuation
    from phloem.protocol.fields import OpenAIBody
    from phloem.text.tokenizer import Tokenizer


class PromptLogprob(Answer, kw_only=True):
    """`rank`: 1 for the likeliest; of a token behind the `prompt_logprobs` likeliest it is that number plus one."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # of each prompt position, by token id; None: nothing before it


def bounded(name: str, number: int | None) -> None:
    """Raises BadRequest for more alternatives of a token than there are for anybody, by the field's own name."""
    if number is not None and number > MAX_TOP_LOGPROBS:
        raise BadRequest(f"{name} must be in [0, {MAX_TOP_LOGPROBS}], got {number}", param=name)


def check(body: OpenAIBody) -> None:
    """Raises BadRequest for `prompt_logprobs` that cannot be had."""
    if body.prompt_logprobs is None:
        return
    if body.prompt_logprobs < 0:
        raise BadRequest(f"prompt_logprobs: {body.prompt_logprobs} is below 0", param="prompt_logprobs")
    bounded("prompt_logprobs", body.prompt_logprobs)
    if body.stream:
        raise BadRequest("prompt_logprobs are not streamed: leave stream out", param="prompt_logprobs")


def ids_of(body: OpenAIBody, output: Continuation, begin: int = 0) -> list[int] | UnsetType:
    return output.ids[begin:] if body.return_token_ids else UNSET


def prompt_ids_of(body: OpenAIBody, output: Continuation) -> list[int] | UnsetType:
    return output.prompt_ids if body.return_token_ids else UNSET


def names(body: OpenAIBody, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer that names tokens in logprobs; None: they are `token_id:N`."""
    return None if body.return_tokens_as_token_ids else tokenizer


def prompt_logprobs_of(
    body: OpenAIBody, output: Continuation, tokenizer: Tokenizer | None
) -> PromptLogprobs | UnsetType:
    if body.prompt_logprobs is None:
        return UNSET
    known, blanks = output.prompt_logprobs or Logprobs(), prompt_start(output)
    found: PromptLogprobs = [None] * blanks
    for at, value in enumerate(known.values):
        token = output.prompt_ids[blanks + at]
        best = known.top[at][: body.prompt_logprobs] if known.top else []
        row = [*best, *([] if token in [other for _, other in best] else [(value, token)])]
        found.append(
            {
                str(one): PromptLogprob(logprob=logprob, rank=rank, decoded_token=text_and_bytes(tokenizer, one)[0])
                for rank, (logprob, one) in enumerate(row, 1)
            }
        )
    return found
