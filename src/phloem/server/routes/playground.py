"""The page at `/`, and what its view of the engine asks for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from phloem.core.errors import NotFound, PhloemError
from phloem.server import page
from phloem.server.door import Door, door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe

if TYPE_CHECKING:
    from phloem.client.counters import Histogram

router = APIRouter(tags=["information"])
LIVE_SECONDS = 2.0  # how long the view waits for an engine that is in a step
MAX_NODES = 4096
_OBJECT: dict[str, Any] = {"type": "object"}
Nodes = Annotated[int, Query(ge=1, le=MAX_NODES, description="Nodes at most; parents come first.")]


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """The page."""
    return _file("index.html")


@router.get("/playground/live", include_in_schema=False)
async def live(request: Request) -> Response:
    """All that the page's view shows, in one answer. It comes also when the engine is gone: then `status` says why."""
    door = door_of(request)
    client, counters = door.client, door.client.counters
    stats = msgspec.structs.asdict(client.connection.stats)
    status, tree = door.health.problem() or "ready", None
    if status == "ready":
        try:
            state = await client.control("state", deadline=LIVE_SECONDS)
            tree = await _tree(door, 512, LIVE_SECONDS)
            stats |= state.data
        except PhloemError:
            status = door.health.problem() or "ready"  # late, or gone meanwhile
    answer: dict[str, Any] = {
        "status": status,
        "time": time.monotonic(),
        "generated": counters.generation_tokens,
        "state": {"paused": False, **stats},
        "latency": {"ttft": _totals(counters.ttft), "itl": _totals(counters.itl)},
        "tree": tree,
    }
    return json_response(answer)


def _totals(histogram: Histogram) -> dict[str, float]:
    return {"sum": histogram.sum, "count": sum(histogram.counts)}


@router.get("/radix_tree", **describe(answer=_OBJECT, errors=(400, *NEEDS_ENGINE)))
async def radix_tree(request: Request, max_nodes: Nodes = 512) -> Response:
    """The prefix cache as a tree: each node's tokens, hits and locks, and the text that it begins with."""
    return json_response(await _tree(door_of(request), max_nodes, 60.0))


async def _tree(door: Door, max_nodes: int, deadline: float) -> dict[str, Any]:
    reply = await door.client.control("cache_tree", deadline=deadline, max_nodes=max_nodes)
    if not reply.ok:
        raise PhloemError(reply.message)
    tokenizer = door.client.tokenizer
    for node in reply.data.get("nodes", []):
        node["text"] = tokenizer.decode(node["first_ids"], skip_special_tokens=False) if tokenizer is not None else ""
    return reply.data


@router.get("/playground/{name}", include_in_schema=False)
async def file(request: Request, name: str) -> Response:
    """One of the page's files."""
    if name not in page.FILES:
        raise NotFound(f"the page has no file {name!r:.100}")
    return _file(name)


def _file(name: str) -> Response:
    return Response(page.read(name), media_type=page.media_type(name), headers=page.HEADERS)
