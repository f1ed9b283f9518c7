"""`POST /v1/score`: how likely each of some label tokens is behind a text, or how well two texts fit together."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.pooled import Reading
from phloem.client.request import new_id
from phloem.core.errors import BadRequest
from phloem.protocol.body import Parser
from phloem.protocol.pooling.run import Pool
from phloem.protocol.pooling.write import Score, ScoresAnswer, usage
from phloem.protocol.score.body import ScoreBody
from phloem.protocol.score.convert import both_texts, to_request
from phloem.protocol.score.write import ScoreAnswer, scores
from phloem.server.door import Door, door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import collect
from phloem.server.usage import usage_of

router = APIRouter(tags=["openai"])
_parser = Parser(ScoreBody)


@router.post("/score", **describe(body=ScoreBody, answer=ScoreAnswer, errors=(404, *NEEDS_ENGINE)))
@router.post("/v1/score", **describe(body=ScoreBody, answer=ScoreAnswer, errors=(404, *NEEDS_ENGINE)))
async def score(request: Request) -> Response:
    """Probabilities of the label tokens as the next token behind query and item, for each item."""
    door = door_of(request)
    body = await door.read(request, _parser)
    pairs = body.text_1 is not None or body.text_2 is not None
    if not pairs and door.info.pooling is not None:
        raise BadRequest("this model does not generate: send text_1 and text_2", param="text_1", code="wrong_task")
    if pairs:
        door.check_model(body.model)
        return await _pairs(request, door, body)
    asked = to_request(body)
    model = door.adapt(asked, body.model)
    door.check_batch(asked)
    outputs = await collect(request, await door.client.submit(asked))
    usage = usage_of(outputs)
    usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens  # nothing is answered with but scores
    return json_response(ScoreAnswer(scores=scores(body, outputs), model=model, usage=usage))


async def _pairs(request: Request, door: Door, body: ScoreBody) -> Response:
    """A score for each pair: one text with one or several, or as many with as many."""
    first, second = both_texts(body)
    reading = Reading(body.truncate_prompt_tokens, priority=body.priority or 0, rid=body.rid, param="text_2")
    found = await Pool(door.client, door.collector(request)).pairs(first, second, reading, body.use_activation)
    data = [Score(index=at, score=float(value[0])) for at, value in enumerate(found.values)]
    return json_response(
        ScoresAnswer(
            id=new_id("score-"),
            created=int(time.time()),
            model=door.info.served_model_name,
            data=data,
            usage=usage(found.tokens),
        )
    )
