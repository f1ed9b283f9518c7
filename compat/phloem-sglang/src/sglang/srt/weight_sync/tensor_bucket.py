"""Tensors one behind the other in one row of bytes, and where each lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang._missing import missing


@dataclass
class FlattenedTensorMetadata:
    """`start_idx`, `end_idx` and `numel` count bytes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class FlattenedTensorBucket:
    """Either of tensors by name, which are put together, or of a row of bytes with its metadata.

    Raises:
        ValueError: neither is given.
    """

    supports_multi_dtypes = True

    def __init__(
        self,
        named_tensors: list[tuple[str, Tensor]] | None = None,
        flattened_tensor: Tensor | None = None,
        metadata: list[FlattenedTensorMetadata] | None = None,
    ) -> None:
        if named_tensors is None:
            if flattened_tensor is None or metadata is None:
                raise ValueError("a bucket needs named_tensors, or flattened_tensor and metadata")
            self.flattened_tensor, self.metadata = flattened_tensor, metadata
            return
        self.metadata, rows, at = [], list[Tensor](), 0
        for name, tensor in named_tensors:
            row = tensor.detach().contiguous().view(-1).view(torch.uint8)
            end = at + row.numel()
            self.metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, at, end, row.numel()))
            rows.append(row)
            at = end
        self.flattened_tensor = torch.cat(rows) if rows else torch.empty(0, dtype=torch.uint8)

    def get_flattened_tensor(self) -> Tensor:
        return self.flattened_tensor

    def get_metadata(self) -> list[FlattenedTensorMetadata]:
        return self.metadata

    def reconstruct_tensors(self) -> list[tuple[str, Tensor]]:
        """Copies: a tensor's bytes may begin anywhere in the row."""
        flat = self.flattened_tensor
        return [
            (one.name, flat[one.start_idx : one.end_idx].clone().view(one.dtype).reshape(one.shape))
            for one in self.metadata
        ]


__getattr__ = missing(__name__)
