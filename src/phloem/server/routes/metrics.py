"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.server.door import door_of
from phloem.server.metrics import CONTENT_TYPE
from phloem.server.openapi import describe

router = APIRouter(tags=["information"])


@router.get("/metrics", **describe(text="text/plain"))
async def metrics(request: Request) -> Response:
    """Counters and gauges in Prometheus' text format."""
    return Response(door_of(request).metrics.render(), media_type=CONTENT_TYPE)
