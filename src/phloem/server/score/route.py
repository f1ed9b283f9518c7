"""`POST /v1/score`: how likely each of some label tokens is behind a text."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.protocol.body import Parser
from phloem.protocol.score.body import ScoreBody
from phloem.protocol.score.convert import to_request
from phloem.protocol.score.write import ScoreAnswer, scores
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import collect
from phloem.server.usage import usage_of

router = APIRouter(tags=["openai"])
_parser = Parser(ScoreBody)


@router.post("/v1/score", **describe(body=ScoreBody, answer=ScoreAnswer, errors=(404, *NEEDS_ENGINE)))
async def score(request: Request) -> Response:
    """Probabilities of the label tokens as the next token behind query and item, for each item."""
    door = door_of(request)
    body = await door.read(request, _parser)
    asked = to_request(body)
    model = door.adapt(asked, body.model)
    door.check_batch(asked)
    outputs = await collect(request, await door.client.submit(asked))
    usage = usage_of(outputs)
    usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens  # nothing is answered with but scores
    return json_response(ScoreAnswer(scores=scores(body, outputs), model=model, usage=usage))
