"""What gateways balance by: how much runs and waits, and what the prefix tree holds."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from starlette.responses import Response

from phloem.client.info import version
from phloem.core.errors import BadRequest, PhloemError
from phloem.server.door import Door, door_of, json_response
from phloem.server.metrics import CONTENT_TYPE
from phloem.server.openapi import NEEDS_ENGINE, describe

if TYPE_CHECKING:
    from phloem.core.messages import Replica, Stats

router = APIRouter(tags=["information"])
_OBJECT: dict[str, Any] = {"type": "object"}
_OBJECTS: dict[str, Any] = {"type": "array", "items": _OBJECT}
SECTIONS = ("core", "memory", "queues", "disagg", "spec", "lora")
FORMATS = ("json", "prometheus")
DUMP_SECONDS = 30.0


@router.get("/get_load", **describe(answer=_OBJECTS))
async def get_load(request: Request) -> Response:
    """Running and waiting requests per rank."""
    door = door_of(request)
    return json_response([_load(door, one) for one in door.client.connection.replicas])


@router.get("/loads", **describe(answer=_OBJECT, errors=(400,)))
@router.get("/v1/loads", **describe(answer=_OBJECT, errors=(400,)))
async def loads(request: Request, include: str = "", format: str = "json", dp_rank: int | None = None) -> Response:
    """Running and waiting requests per rank, with the sum that gateways balance by.

    `include`: names of sections, separated by commas; all of them unless it is given.
    """
    wanted = [name.strip() for name in include.split(",") if name.strip()] or ["all"]
    if strange := [name for name in wanted if name not in (*SECTIONS, "all")]:
        raise BadRequest(f"include: {strange[0]!r:.100} is none of {', '.join(SECTIONS)}, all", param="include")
    if format not in FORMATS:
        raise BadRequest(f"format: {format!r:.100} is neither json nor prometheus", param="format")
    door = door_of(request)
    replicas, sections = door.client.connection.replicas, SECTIONS if "all" in wanted else wanted
    ranks = [{**_load(door, one), **_sections(one, sections)} for one in replicas if dp_rank in (None, one.rank)]
    if format == "prometheus":
        return Response(_as_gauges(ranks), media_type=CONTENT_TYPE)
    names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "token_usage", "gen_throughput")
    info = door.client.connection.ready or {}
    return json_response(
        {
            "timestamp": datetime.now(UTC).isoformat(),
            "version": version(),
            "accelerator": info.get("device", "unknown"),
            "num_accelerators": len(replicas),
            "dp_rank_count": len(replicas),
            "loads": ranks,
            "aggregate": {f"total_{name.removeprefix('num_')}": sum(rank[name] for rank in ranks) for name in names},
        }
    )


@router.get("/kv_events/dump", **describe(answer=_OBJECT, errors=NEEDS_ENGINE))
async def kv_events_dump(request: Request) -> Response:
    """Everything that is cached, as the events that a reader needs to know it, parents first; `sequence` is that of the
    first message that may not be in it."""
    reply = await door_of(request).client.control("kv_events", deadline=DUMP_SECONDS)
    if not reply.ok:
        error: PhloemError = BadRequest(reply.message, code="not_supported")
        raise error
    return json_response(reply.data)


def _load(door: Door, one: Replica) -> dict[str, Any]:
    stats, most = one.stats, (one.ready or {}).get("max_running_requests", 0)
    in_flight = door.client.in_flight if one.in_flight is None else one.in_flight
    usage = stats.used_tokens / stats.total_tokens if stats.total_tokens else 0.0
    # The engine tells once a second; who waits until all has ended, or was aborted, is not to wait for that.
    running = min(stats.running, in_flight)
    waiting = min(stats.waiting, in_flight - running)
    return {
        "timestamp": datetime.now(UTC).isoformat(),
        "dp_rank": one.rank,
        "num_reqs": running + waiting,
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_total_reqs": running + waiting,
        "num_waiting_uncached_tokens": stats.waiting_tokens if waiting else 0,
        "num_tokens": stats.used_tokens,
        "num_used_tokens": stats.used_tokens,
        "num_total_tokens": stats.used_tokens + stats.evictable_tokens,
        "num_active_tokens": stats.used_tokens,
        "max_total_num_tokens": stats.total_tokens,
        "token_usage": usage,
        "active_token_usage": usage,
        "gen_throughput": stats.gen_throughput,
        "cache_hit_rate": stats.cache_hit_rate,
        "utilization": running / most if most else usage,
        "max_running_requests": most,
        "evicted_tokens": stats.evicted_tokens,
        "total_prefill_uncached_tokens": stats.prefill_tokens,
        "total_prefill_busy_us": round(stats.prefill_seconds * 1e6),
        **_drafts(stats),
    }


def _sections(one: Replica, wanted: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """What stands beside the core numbers."""
    stats, info = one.stats, one.ready or {}
    found: dict[str, Any] = {}
    if "memory" in wanted:
        found["memory"] = {
            "weight_gb": info.get("weight_bytes", 0) / 2**30,
            "kv_cache_gb": info.get("kv_bytes_per_token", 0) * stats.total_tokens / 2**30,
            "graph_gb": info.get("graph_bytes", 0) / 2**30,
            "token_capacity": stats.total_tokens or info.get("max_total_num_tokens", 0),
        }
    if "queues" in wanted:
        found["queues"] = {"waiting": stats.waiting, "grammar": 0, "paused": 0, "retracted": stats.preemptions}
    if "disagg" in wanted:
        found["disaggregation"] = info.get("disaggregation") or {"mode": "null"}
    return found


def _drafts(stats: Stats) -> dict[str, Any]:
    """The section of drafts; nothing where none were verified."""
    if not stats.spec_verify_calls:
        return {}
    found = {"accept_length": stats.spec_accept_length, "accept_rate": stats.spec_accept_rate}
    return {"speculative": {**found, "verify_calls": stats.spec_verify_calls}}


def _as_gauges(ranks: list[dict[str, Any]]) -> bytes:
    registry = CollectorRegistry()
    numbers = [name for name in (ranks[0] if ranks else {}) if name != "dp_rank"]
    for name in numbers:
        if not isinstance(ranks[0][name], int | float):
            continue
        gauge = Gauge(f"phloem_load_{name}", name.replace("_", " "), ["dp_rank"], registry=registry)
        for rank in ranks:
            gauge.labels(str(rank["dp_rank"])).set(rank[name])
    return generate_latest(registry)
