"""`GET /v1/models` and `/v1/models/{id}`."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.protocol.answers import Answer
from phloem.server.door import Door, door_of, json_response
from phloem.server.openapi import describe


class ModelCard(Answer, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "phloem"
    root: str
    max_model_len: int
    task: str


class ModelList(Answer, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


router = APIRouter(tags=["openai"])


def _card(door: Door) -> ModelCard:
    info = door.info
    return ModelCard(
        id=info.served_model_name,
        created=info.created,
        root=info.model_path,
        max_model_len=info.context_length,
        task=info.task,
    )


@router.get("/v1/models", **describe(answer=ModelList))
async def models(request: Request) -> Response:
    """The models that this server serves."""
    return json_response(ModelList(data=[_card(door_of(request))]))


@router.get("/v1/models/{name:path}", **describe(answer=ModelCard, errors=(404,)))
async def model(request: Request, name: str) -> Response:
    """One model."""
    door = door_of(request)
    if not name:  # of a client that joins paths with a slash
        return await models(request)
    door.check_model(name)
    return json_response(_card(door))
