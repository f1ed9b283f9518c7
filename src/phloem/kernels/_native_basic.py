"""Elementwise ops and norms of the native table. Every function is the one of its name in `reference.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime


def rows_of(x: Tensor) -> Tensor:
    """`x` as float32 `[rows, N]` with a contiguous last axis; views stay views."""
    if x.dtype != torch.float32:
        raise TypeError(f"native ops take float32 activations, not {x.dtype}")
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def ops(rt: Runtime) -> dict[str, Any]:
    ADD = rt.op("add")

    def add(x: Tensor, y: Tensor) -> Tensor:
        x_TN, y_TN = rows_of(x), rows_of(y)
        out = rt.empty(x.shape)
        rows, n = x_TN.shape
        rt.call(
            ADD, rows * n // 8,
            x_TN.data_ptr(), y_TN.data_ptr(), out.data_ptr(), rows, n, x_TN.stride(0), y_TN.stride(0), n,
        )  # fmt: skip
        return out

    return {"add": add}
