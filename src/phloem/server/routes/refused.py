"""Calls of trainers that are known here and not served: each says why, and what does the same. Every method of them is
refused alike, so that a caller that probes is told too."""

from __future__ import annotations

from fastapi import APIRouter

from phloem.core.errors import BadRequest
from phloem.server.openapi import describe

router = APIRouter(tags=["weights"])

PEER = "no peer writes into this engine's memory (RDMA)"
VLLM = "vLLM's engines of weight transfer are not spoken"
WAYS = "send weights by /update_weights_from_tensor, _from_distributed, _from_ipc or _from_disk"
REFUSED: dict[str, str] = {
    "/pull_weights": "checkpoints are not fetched and not patched: put a whole one on this machine, and call "
    "/update_weights_from_disk",
    "/parallelism_config": f"{PEER}: {WAYS}",
    "/get_remote_instance_transfer_engine_info": f"{PEER}: {WAYS}",
    "/init_weights_send_group_for_remote_instance": f"an engine does not send its weights: {WAYS}",
    "/send_weights_to_remote_instance": f"an engine does not send its weights: {WAYS}",
    "/get_world_size": f"{VLLM}: {WAYS}; one rank of a trainer's group is this engine's",
    "/init_weight_transfer_engine": f"{VLLM}: {WAYS}",
    "/start_weight_update": f"{VLLM}: {WAYS}; /begin_weight_update collects several calls",
    "/update_weights": f"{VLLM}: {WAYS}",
    "/finish_weight_update": f"{VLLM}: {WAYS}; /end_weight_update puts in place what several calls brought",
}


def _route(path: str, why: str) -> None:
    async def refuse() -> None:
        raise BadRequest(f"{path}: {why}", code="not_supported")

    refuse.__doc__ = f"Refused: {why}."
    for method in ("GET", "POST"):
        router.add_api_route(path, refuse, methods=[method], include_in_schema=False, **describe(errors=(400,)))


for _path, _why in REFUSED.items():
    _route(_path, _why)
