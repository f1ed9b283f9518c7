"""Health, version, and what the server is made of."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.info import version
from phloem.client.request import GenerateRequest, Item, new_id
from phloem.core.errors import EngineDead, PhloemError
from phloem.core.request import SamplingParams
from phloem.protocol.answers import Status
from phloem.server.door import Door, door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import collect

if TYPE_CHECKING:
    from phloem.core.messages import Stats

    pass

router = APIRouter(tags=["information"])
STATE_SECONDS = 2.0  # how long an information route waits for the engine's own words
PROBE_SECONDS = 20.0
_OBJECT: dict[str, Any] = {"type": "object"}
_OBJECTS: dict[str, Any] = {"type": "array", "items": _OBJECT}


@router.get("/health", **describe(answer=Status, errors=NEEDS_ENGINE))
@router.get("/ready", **describe(answer=Status, errors=NEEDS_ENGINE))
@router.get("/ping", **describe(answer=Status, errors=NEEDS_ENGINE))
async def health(request: Request) -> Response:
    """200 while the engine can serve; 503 with the reason when it cannot."""
    problem = door_of(request).health.problem()
    if problem is not None:
        raise EngineDead(problem, code="unhealthy")
    return json_response(Status(status="ok"))


@router.get("/health_generate", **describe(answer=Status, errors=NEEDS_ENGINE))
async def health_generate(request: Request) -> Response:
    """Generate one token for real; or compute one text, where the model does not generate."""
    door = door_of(request)
    bos = door.client.tokenizer.bos_id if door.client.tokenizer is not None else None
    pooled = door.info.pooling is not None
    params = SamplingParams(max_new_tokens=0 if pooled else 1, temperature=0.0)
    item = Item(sampling=params, ids=[bos if bos is not None else 0], id=new_id("health-"), pooled=pooled)
    call = await door.client.submit(GenerateRequest([item]))
    late = EngineDead(f"no token within {PROBE_SECONDS:g} s")
    timer = asyncio.get_running_loop().call_later(PROBE_SECONDS, call.fail, late)
    try:
        await collect(request, call)
    finally:
        timer.cancel()
    return json_response(Status(status="ok"))


@router.get("/version", **describe(answer=_OBJECT))
async def show_version(request: Request) -> Response:
    """The server's version."""
    return json_response({"version": version()})


@router.get("/model_info", **describe(answer=_OBJECT))
@router.get("/get_model_info", **describe(answer=_OBJECT))
async def model_info(request: Request) -> Response:
    """Facts about the model."""
    door = door_of(request)
    info = door.info
    return json_response(
        {
            "model_path": info.model_path,
            "served_model_name": info.served_model_name,
            "tokenizer_path": info.tokenizer_path,
            "is_generation": info.pooling is None,
            "task": info.task,
            "preferred_sampling_params": None,
            "weight_version": door_of(request).client.weight_version,
            "reasoning_parser": info.reasoning_parser,
            "tool_call_parser": info.tool_parser,
            "disaggregation_mode": "null",
            "has_image_understanding": door.client.pictures is not None,
            "has_audio_understanding": False,
            "model_type": info.model_type,
            "architectures": list(info.architectures),
            "context_length": info.context_length,
            "vocab_size": info.vocab_size,
        }
    )


@router.get("/server_info", **describe(answer=_OBJECT))
@router.get("/get_server_info", **describe(answer=_OBJECT))
async def server_info(request: Request) -> Response:
    """The resolved configuration, the decisions behind it, and the engine's state."""
    door = door_of(request)
    engine = door.client.connection.ready or {}
    flat = door.config.flat()
    flat |= {name: "***" for name in ("api_key", "admin_api_key") if flat[name] is not None}
    answer: dict[str, Any] = {
        **flat,
        "model_path": door.info.model_path,
        "served_model_name": door.info.served_model_name,
        "tokenizer_path": door.info.tokenizer_path,
        "context_length": door.info.context_length,
        "version": version(),
        "tp_size": 1,
        "dp_size": 1,
        "disaggregation_mode": "null",
        "status": door.health.problem() or "ready",
        **{key: value for key, value in engine.items() if key != "decisions"},
        "decisions": [*engine.get("decisions", []), *door.info.decisions],
        "internal_states": [await _state(door)],
    }
    if answer["max_running_requests"] is None:
        answer["max_running_requests"] = engine.get("max_running_requests")
    return json_response(answer)


async def _state(door: Door) -> dict[str, Any]:
    """The engine's own account, or the last it sent when it does not answer in time."""
    state: dict[str, Any] = msgspec.structs.asdict(door.client.connection.stats)
    if door.client.dead is None and door.client.connection.ready is not None:
        try:
            state |= (await door.client.control("state", deadline=STATE_SECONDS)).data
        except PhloemError as error:
            state["stale"] = error.message
    return {
        "last_gen_throughput": state["gen_throughput"],
        "memory_usage": {
            "token_capacity": state["total_tokens"],
            "used_tokens": state["used_tokens"],
            "graph": state.get("graph_bytes", 0) / 2**30,  # GiB
        },
        "avg_spec_accept_length": state["spec_accept_length"] or None,
        "num_running_reqs": state["running"],
        "num_waiting_reqs": state["waiting"],
        **state,
    }


def _load(door: Door) -> dict[str, Any]:
    link = door.client.connection
    stats, most = link.stats, (link.ready or {}).get("max_running_requests", 0)
    usage = stats.used_tokens / stats.total_tokens if stats.total_tokens else 0.0
    return {
        "dp_rank": 0,
        "num_reqs": stats.running + stats.waiting,
        "num_running_reqs": stats.running,
        "num_waiting_reqs": stats.waiting,
        "num_total_reqs": stats.running + stats.waiting,
        "num_tokens": stats.used_tokens,
        "num_used_tokens": stats.used_tokens,
        "max_total_num_tokens": stats.total_tokens,
        "token_usage": usage,
        "active_token_usage": usage,
        "gen_throughput": stats.gen_throughput,
        "cache_hit_rate": stats.cache_hit_rate,
        "utilization": stats.running / most if most else usage,
        "max_running_requests": most,
        **_drafts(stats),
    }


def _drafts(stats: Stats) -> dict[str, Any]:
    """The section of drafts; nothing where none were verified."""
    if not stats.spec_verify_calls:
        return {}
    found = {"accept_length": stats.spec_accept_length, "accept_rate": stats.spec_accept_rate}
    return {"speculative": {**found, "verify_calls": stats.spec_verify_calls}}


@router.get("/get_load", **describe(answer=_OBJECTS))
async def get_load(request: Request) -> Response:
    """Running and waiting requests per rank."""
    return json_response([_load(door_of(request))])


@router.get("/loads", **describe(answer=_OBJECT))
@router.get("/v1/loads", **describe(answer=_OBJECT))
async def loads(request: Request) -> Response:
    """Running and waiting requests per rank, with the sum that gateways balance by."""
    load = _load(door_of(request))
    names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "token_usage", "gen_throughput")
    return json_response(
        {
            "timestamp": datetime.now(UTC).isoformat(),
            "version": version(),
            "dp_rank_count": 1,
            "loads": [load],
            "aggregate": {f"total_{name.removeprefix('num_')}": load[name] for name in names},
        }
    )
