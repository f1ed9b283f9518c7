"""What an engine is asked, as dataclasses: their fields are those of Phloem's bodies of the same calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from msgspec.structs import fields as fields_of

from phloem.protocol import weights as ask
from phloem.protocol.body import Body
from phloem.protocol.generate.body import GenerateBody
from sglang._missing import missing
from sglang.srt.entrypoints.openai.protocol import Function, Tool

__all__ = ["Function", "Tool"]


def asked(obj: Any) -> dict[str, Any]:
    """The fields that are set."""
    return {spec.name: value for spec in fields(obj) if (value := getattr(obj, spec.name)) is not None}


def _like(name: str, body: type[Body], *more: str, **defaults: Any) -> Any:
    names = list(dict.fromkeys([*defaults, *more, *(spec.encode_name for spec in fields_of(body))]))
    made = make_dataclass(name, [(one, Any, field(default=defaults.get(one))) for one in names])
    made.__module__ = __name__
    return made


GenerateReqInput = _like("GenerateReqInput", GenerateBody)
UpdateWeightsFromTensorReqInput = _like(
    "UpdateWeightsFromTensorReqInput",
    ask.FromTensorBody,
    serialized_named_tensors=None,
    load_format=None,
    flush_cache=True,
)
UpdateWeightFromDiskReqInput = _like(
    "UpdateWeightFromDiskReqInput", ask.FromDiskBody, model_path=None, load_format=None
)
UpdateWeightsFromDistributedReqInput = _like(
    "UpdateWeightsFromDistributedReqInput", ask.FromDistributedBody, names=None, dtypes=None, shapes=None
)
UpdateWeightsFromIPCReqInput = _like(
    "UpdateWeightsFromIPCReqInput", ask.FromIpcBody, zmq_handles=None, flush_cache=True, weight_version=None
)
InitWeightsUpdateGroupReqInput = _like(
    "InitWeightsUpdateGroupReqInput", ask.InitGroupBody, master_address=None, master_port=None, rank_offset=None,
    world_size=None, group_name=ask.GROUP, backend="gloo",
)  # fmt: skip
DestroyWeightsUpdateGroupReqInput = _like("DestroyWeightsUpdateGroupReqInput", ask.DestroyGroupBody)
ReleaseMemoryOccupationReqInput = _like("ReleaseMemoryOccupationReqInput", ask.MemoryBody, tags=None)
ResumeMemoryOccupationReqInput = _like("ResumeMemoryOccupationReqInput", ask.MemoryBody, tags=None)
UpdateWeightVersionReqInput = _like(
    "UpdateWeightVersionReqInput", ask.VersionBody, new_version=None, abort_all_requests=True
)


@dataclass
class PauseGenerationReqInput:
    mode: str = "abort"


@dataclass
class ContinueGenerationReqInput:
    torch_empty_cache: bool = False


@dataclass
class FlushCacheReqOutput:
    success: bool
    message: str = ""


@dataclass
class AbortReq:
    rid: str = ""
    abort_all: bool = False


@dataclass
class LoadLoRAAdapterReqInput:
    lora_name: str
    lora_path: str
    pinned: bool = False


@dataclass
class UnloadLoRAAdapterReqInput:
    lora_name: str


@dataclass
class LoadLoRAAdapterFromTensorsReqInput:
    """What `MultiprocessingSerializer` made of the tensors, once for each rank; older callers have one text of it in
    `serialized_tensors`."""

    lora_name: str
    config_dict: dict[str, Any]
    serialized_named_tensors: list[Any] | None = None
    pinned: bool = False
    added_tokens_config: dict[str, Any] | None = None
    lora_id: str | None = None
    load_format: str | None = None
    serialized_tensors: Any = None
    expected_checksums: Any = None
    upsert: bool = False


@dataclass
class LoadLoRAAdapterFromDistributedReqInput:
    """What rank 0 of a group is about to broadcast, in that order."""

    lora_name: str
    config_dict: dict[str, Any]
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str | None = None
    pinned: bool = False
    added_tokens_config: dict[str, Any] | None = None
    lora_id: str | None = None
    upsert: bool = False


@dataclass
class LoRAUpdateOutput:
    success: bool
    error_message: str | None = None
    loaded_adapters: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.success, self.error_message))


@dataclass
class RpcReqInput:
    method: str
    parameters: dict[str, Any] | None = None


@dataclass
class RpcReqOutput:
    success: bool
    message: str = ""


__getattr__ = missing(__name__)
