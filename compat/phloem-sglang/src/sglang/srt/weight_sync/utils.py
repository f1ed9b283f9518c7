"""Weights of a trainer to an engine beside it (as verl calls it)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sglang._missing import missing
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
from sglang.srt.model_executor.model_runner import LocalSerializedTensor
from sglang.srt.utils import MultiprocessingSerializer


def _preprocess_tensor_for_update_weights(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is shared out among ranks (a DTensor); another as it is."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


async def update_weights(
    engine: Any,
    params_batch: Iterable[tuple[str, Tensor]],
    device_mesh_key: str,
    device_mesh: Any,
    load_format: str | None = None,
    flush_cache: bool = True,
) -> Any:
    """Every rank of the mesh calls it; rank 0 asks `engine.update_weights_from_tensor` and gives its answer."""
    size = device_mesh[device_mesh_key].mesh.size()[0]
    rank = device_mesh[device_mesh_key].get_local_rank()
    mine = [
        (name, MultiprocessingSerializer.serialize(_preprocess_tensor_for_update_weights(tensor.detach())))
        for name, tensor in params_batch
    ]
    parts: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(mine, parts, dst=device_mesh.mesh.tolist()[0], group=device_mesh[device_mesh_key].get_group())
    if parts is None:
        return None
    named = [
        (group[0][0], LocalSerializedTensor(values=[value for _, value in group])) for group in zip(*parts, strict=True)
    ]
    blobs = [MultiprocessingSerializer.serialize(named) for _ in range(size)]
    asked = UpdateWeightsFromTensorReqInput(
        serialized_named_tensors=blobs, load_format=load_format, flush_cache=flush_cache
    )
    return await engine.update_weights_from_tensor(asked)


__getattr__ = missing(__name__)
