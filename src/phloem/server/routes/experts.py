"""How often experts are chosen, as SGLang's recorder tells it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.core.messages import ControlReply
from phloem.protocol.answers import ControlAnswer
from phloem.server.door import door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.routes.control import refused

router = APIRouter(tags=["control"])
_SAID: dict[str, Any] = describe(answer=ControlAnswer, errors=(400, *NEEDS_ENGINE))
_COUNTS: dict[str, Any] = {
    "type": "object",
    "properties": {"logical_count": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}},
}
_TOLD: dict[str, Any] = describe(answer=_COUNTS, errors=(400, *NEEDS_ENGINE))
SECONDS = 60.0


async def _ask(request: Request, action: str) -> ControlReply:
    reply = await door_of(request).client.control("expert_distribution", deadline=SECONDS, action=action)
    refused(reply)
    return reply


@router.get("/start_expert_distribution_record", **_SAID)
@router.post("/start_expert_distribution_record", **_SAID)
async def start_expert_distribution_record(request: Request) -> Response:
    """Count from now on which experts tokens choose (`--expert-distribution-recorder-mode stat`)."""
    await _ask(request, "start")
    return json_response(ControlAnswer(success=True, message="recording"))


@router.get("/stop_expert_distribution_record", **_SAID)
@router.post("/stop_expert_distribution_record", **_SAID)
async def stop_expert_distribution_record(request: Request) -> Response:
    """Count no more; what was counted stays until the next start."""
    await _ask(request, "stop")
    return json_response(ControlAnswer(success=True, message="recorded"))


@router.get("/dump_expert_distribution_record", **_TOLD)
@router.post("/dump_expert_distribution_record", **_TOLD)
async def dump_expert_distribution_record(request: Request) -> Response:
    """How often each expert was chosen, a list for each sparse layer: saved, a file for `--init-expert-location`."""
    reply = await _ask(request, "dump")
    return json_response({"logical_count": reply.data.get("logical_count", [])})
