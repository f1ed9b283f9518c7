"""A tensor that was serialised once for each rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang._missing import missing
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket, FlattenedTensorMetadata

__all__ = ["FlattenedTensorBucket", "FlattenedTensorMetadata", "LocalSerializedTensor"]


@dataclass
class LocalSerializedTensor:
    """`values[rank]`: what `MultiprocessingSerializer` made of that rank's tensor."""

    values: list[bytes]

    def get(self, rank: int) -> Any:
        return MultiprocessingSerializer.deserialize(self.values[rank])


__getattr__ = missing(__name__)
