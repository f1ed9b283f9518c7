"""The classes of serialised weights, where callers looked for them first."""

from sglang._missing import missing
from sglang.srt.model_executor.model_runner_components.weight_updater import LocalSerializedTensor
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket, FlattenedTensorMetadata

__all__ = ["FlattenedTensorBucket", "FlattenedTensorMetadata", "LocalSerializedTensor"]
__getattr__ = missing(__name__)
