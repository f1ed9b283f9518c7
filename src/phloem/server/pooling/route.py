"""`/v1/embeddings`, `/v1/rerank`, `/classify`, `/encode`: models that do not generate."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.request import new_id
from phloem.core.errors import BadRequest
from phloem.protocol.body import Parser
from phloem.protocol.pooling import write
from phloem.protocol.pooling.body import ClassifyBody, EmbeddingsBody, EncodeBody, RerankBody
from phloem.protocol.pooling.convert import activated, document_text, finished, reading_of, texts_of
from phloem.protocol.pooling.run import Pool
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe

router = APIRouter(tags=["openai"])
_embeddings, _rerank = Parser(EmbeddingsBody), Parser(RerankBody)
_classify, _encode = Parser(ClassifyBody), Parser(EncodeBody)
_ERRORS = (404, *NEEDS_ENGINE)
_REF = {"$ref": f"#/components/schemas/{write.Encoded.__name__}"}
_ENCODED: dict[str, Any] = {"anyOf": [_REF, {"type": "array", "items": _REF}]}


@router.post("/v1/embeddings", **describe(body=EmbeddingsBody, answer=write.EmbeddingsAnswer, errors=_ERRORS))
async def embeddings(request: Request) -> Response:
    """A vector for each text."""
    door = door_of(request)
    body = await door.read(request, _embeddings)
    door.check_model(body.model)
    found = await Pool(door.client, door.collector(request)).embeddings(texts_of(body.input, "input"), body)
    packed = body.encoding_format == "base64"
    return json_response(
        write.EmbeddingsAnswer(
            data=[write.embedding(at, vector, packed) for at, vector in enumerate(found.values)],
            model=door.info.served_model_name,
            usage=write.usage(found.tokens),
        )
    )


@router.post("/v2/rerank", **describe(body=RerankBody, answer=write.RerankAnswer, errors=_ERRORS))
@router.post("/rerank", **describe(body=RerankBody, answer=write.RerankAnswer, errors=_ERRORS))
@router.post("/v1/rerank", **describe(body=RerankBody, answer=write.RerankAnswer, errors=_ERRORS))
async def rerank(request: Request) -> Response:
    """Documents by how well they answer a query, the best first."""
    door = door_of(request)
    body = await door.read(request, _rerank)
    door.check_model(body.model)
    if body.top_n is not None and body.top_n < 0:
        raise BadRequest(f"top_n must be at least 0, got {body.top_n}", param="top_n")
    if body.max_tokens_per_doc is not None and body.max_tokens_per_doc < 1:
        raise BadRequest("max_tokens_per_doc must be at least 1", param="max_tokens_per_doc")
    texts = [document_text(document, at, body.rank_fields) for at, document in enumerate(body.documents)]
    if body.instruct is not None and (door.info.pooling is None or door.info.pooling.judge is None):
        raise BadRequest("instruct: this model is not asked in words", param="instruct")
    reading = reading_of(body, "documents", body.max_tokens_per_doc, body.instruct)
    pool = Pool(door.client, door.collector(request))
    found = await pool.pairs([body.query], texts, reading, body.use_activation)
    shows = body.return_documents if body.return_documents is not None else "/v2/" not in request.url.path
    return json_response(
        write.RerankAnswer(
            id=new_id("rerank-"),
            model=door.info.served_model_name,
            results=write.ranked(found.values, texts if shows else None, body.top_n),
            usage=write.usage(found.tokens),
            meta={"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        )
    )


@router.post("/v1/classify", **describe(body=ClassifyBody, answer=write.ClassifyAnswer, errors=_ERRORS))
@router.post("/classify", **describe(body=ClassifyBody, answer=write.ClassifyAnswer, errors=_ERRORS))
async def classify(request: Request) -> Response:
    """The label of each text, or of each of its tokens, with every label's score."""
    door = door_of(request)
    body = await door.read(request, _classify)
    door.check_model(body.model)
    name = "text" if body.input is None and body.text is not None else "input"
    pool = Pool(door.client, door.collector(request))
    pool.must_be("classify", "score", "tokens")
    found = await pool.raw(texts_of(body.text if name == "text" else body.input, name), reading_of(body, name))
    scores = [activated(one, pool.pooling, body.use_activation) for one in found.values]
    return json_response(
        write.ClassifyAnswer(
            id=new_id("classify-"),
            created=int(time.time()),
            model=door.info.served_model_name,
            data=[write.classes(at, one, pool.pooling.labels) for at, one in enumerate(scores)],
            usage=write.usage(found.tokens),
        )
    )


@router.post("/encode", **describe(body=EncodeBody, answer=_ENCODED, errors=_ERRORS))
async def encode(request: Request) -> Response:
    """What the model makes of a text: a vector, raw scores of labels, or those of each token; of several, a list."""
    door = door_of(request)
    body = await door.read(request, _encode)
    door.check_model(body.model)
    if (body.text is None) == (body.input_ids is None):
        raise BadRequest("either text or input_ids is needed", param="text")
    name = "text" if body.text is not None else "input_ids"
    texts = texts_of(body.text if body.text is not None else body.input_ids, name)
    pool = Pool(door.client, door.collector(request))
    found = await pool.raw(texts, reading_of(body, name))
    values = found.values
    if pool.pooling.task == "embed":
        values = finished(values, pool.pooling, body.dimensions, body.normalize)
    answers = [write.encoded(one, output) for one, output in zip(values, found.outputs, strict=True)]
    several = isinstance(body.text, list) or bool(body.input_ids and isinstance(body.input_ids[0], list))
    return json_response(list(answers) if several else answers[0])
