"""`POST /v1/score`: how likely each of some label tokens is behind a text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.server.answers import ScoreAnswer
from phloem.server.body import Parser
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.protocol_responses import ScoreBody
from phloem.server.request import GenerateRequest, Item, new_id
from phloem.server.stream import collect
from phloem.server.usage import usage_of

if TYPE_CHECKING:
    from phloem.server.request import Output

router = APIRouter(tags=["openai"])
_parser = Parser(ScoreBody)


@router.post("/v1/score", **describe(body=ScoreBody, answer=ScoreAnswer, errors=(404, *NEEDS_ENGINE)))
async def score(request: Request) -> Response:
    """Probabilities of the label tokens as the next token behind query and item, for each item."""
    door = door_of(request)
    body = await door.read(request, _parser)
    door.check_model(body.model)
    labels = body.label_token_ids or []
    if not labels:
        raise BadRequest("label_token_ids: at least one is needed", param="label_token_ids")
    rid = body.rid or new_id("score-")
    items = [
        Item(
            sampling=SamplingParams(max_new_tokens=1, temperature=0.0),
            text=prompt if isinstance(prompt, str) else None,
            ids=prompt if isinstance(prompt, list) else None,
            id=f"{rid}-{at}",
            return_logprob=True,
            token_ids_logprob=labels,
            priority=body.priority or 0,
        )
        for at, prompt in enumerate(_prompts(body))
    ]
    asked = GenerateRequest(items)
    door.check_batch(asked)
    outputs = await collect(request, await door.client.submit(asked))
    scores = [_scores(output, labels, bool(body.apply_softmax)) for output in outputs]
    usage = usage_of(outputs)
    usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens  # nothing is answered with but scores
    return json_response(ScoreAnswer(scores=scores, model=door.info.served_model_name, usage=usage))


def _prompts(body: ScoreBody) -> list[str | list[int]]:
    """Query and item in one, for each item; both texts, or both token ids."""
    query, items = body.query, body.items
    if query is None or items is None:
        name = "query" if query is None else "items"
        raise BadRequest(f"{name} is needed", param=name)
    found: list[str | list[int]] = []
    ids = [item for item in items if isinstance(item, int)]
    several = [items] if isinstance(items, str) else [ids] if ids and len(ids) == len(items) else items
    for at, item in enumerate(several):
        if isinstance(query, str) and isinstance(item, str):
            found.append(item + query if body.item_first else query + item)
            continue
        if not (isinstance(query, list) and isinstance(item, list)):
            raise BadRequest(f"items[{at}]: query and items are both texts or both token ids", param="items")
        found.append(item + query if body.item_first else query + item)
    if not found:
        raise BadRequest("items: at least one is needed", param="items")
    return found


def _scores(output: Output, labels: list[int], softmax: bool) -> list[float]:
    """Probabilities in the order of the labels: over all tokens, or with `softmax` among the labels."""
    known = {token: value for value, token in output.logprobs.chosen[0]} if output.logprobs.chosen else {}
    values = [known.get(token, -math.inf) for token in labels]
    best = max(values) if softmax else 0.0
    if math.isinf(best):
        return [0.0] * len(values)
    weights = [math.exp(value - best) for value in values]
    total = sum(weights) if softmax else 1.0
    return [weight / total for weight in weights]
