"""Health, version, and what the server is made of."""

from __future__ import annotations

import asyncio
from math import isqrt
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.client.info import version
from phloem.client.request import GenerateRequest, Item, new_id
from phloem.core.config import SECRETS
from phloem.core.errors import EngineDead, PhloemError
from phloem.core.messages import Draw, Pixels, Replica
from phloem.core.request import SamplingParams
from phloem.diffusion.request import Facts
from phloem.protocol.answers import Status
from phloem.server.door import Door, door_of, json_response
from phloem.server.openapi import NEEDS_ENGINE, describe
from phloem.server.stream import collect, painted

router = APIRouter(tags=["information"])
STATE_SECONDS = 2.0  # how long an information route waits for the engine's own words
PROBE_SECONDS = 20.0
_OBJECT: dict[str, Any] = {"type": "object"}


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
    """Generate one token for real; or compute one text, or a step of a small picture, where the model does that."""
    door = door_of(request)
    if door.info.draws:
        facts = Facts(**door.client.picture_facts())
        side = facts.grid * max(1, min(8, isqrt(facts.max_pixels) // facts.grid))
        probe = Draw(id=new_id("health-"), prompt="", seed=0, width=side, height=side, steps=2, film=facts.films)
        probe.frames = 1 if facts.films else 0
        probe.pictures = [Pixels(side, side, bytes(3 * side * side))] if facts.needs_pictures else []
        probe.mask = probe.pictures[0] if facts.needs_pictures and facts.masks else None
        async with asyncio.timeout(PROBE_SECONDS):
            await painted(request, door.client.draw([probe]))
        return json_response(Status(status="ok"))
    if door.info.encodes:
        await door.client.control("state", PROBE_SECONDS)
        return json_response(Status(status="ok"))
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
            "is_generation": info.pooling is None and not info.draws and not info.encodes,
            "pictures": (door_of(request).client.connection.ready or {}).get("pictures"),
            "task": info.task,
            "preferred_sampling_params": None,
            "weight_version": door_of(request).client.weight_version,
            "reasoning_parser": info.reasoning_parser,
            "tool_call_parser": info.tool_parser,
            "disaggregation_mode": info.role,
            "has_image_understanding": "images" in info.features,
            "has_video_understanding": "videos" in info.features,
            "has_audio_understanding": "sounds" in info.features,
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
    flat |= {name: "***" for name in SECRETS if flat[name] is not None}
    answer: dict[str, Any] = {
        **flat,
        "model_path": door.info.model_path,
        "served_model_name": door.info.served_model_name,
        "tokenizer_path": door.info.tokenizer_path,
        "context_length": door.info.context_length,
        "version": version(),
        "disaggregation_mode": door.info.role,
        "status": door.health.problem() or "ready",
        **{key: value for key, value in engine.items() if key != "decisions"},
        "decisions": [*engine.get("decisions", []), *door.info.decisions],
        "internal_states": await _states(door),
    }
    # What slime compares of an engine that it has not started.
    answer |= {"enable_memory_saver": True, "base_gpu_id": answer["base_gpu_id"] or 0}
    answer["node_rank"] = answer["node_rank"] or 0
    if answer["max_running_requests"] is None:
        answer["max_running_requests"] = engine.get("max_running_requests")
    return json_response(answer)


async def _states(door: Door) -> list[dict[str, Any]]:
    """Each engine's own account, or the last it sent when it does not answer in time."""
    link, told, stale = door.client.connection, dict[str, Any](), ""
    if door.client.dead is None and link.ready is not None:
        try:
            told = (await door.client.control("state", deadline=STATE_SECONDS)).data
        except PhloemError as error:
            stale = error.message
    each = {one["dp_rank"]: one for one in told.pop("ranks", [{"dp_rank": 0, **told}] if told else [])}
    replicas = link.replicas
    return [_state(one, each.get(one.rank), stale, several=len(replicas) > 1) for one in replicas]


def _state(one: Replica, told: dict[str, Any] | None, stale: str, *, several: bool) -> dict[str, Any]:
    state: dict[str, Any] = {**msgspec.structs.asdict(one.stats), **(told or {})}
    state.pop("dp_rank", None)
    if told is None and (stale or several):
        state["stale"] = stale or one.problem or "it did not answer"
    if several:
        state["dp_rank"] = one.rank
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
