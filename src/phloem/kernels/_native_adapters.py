"""Low-rank additions of the native table, as `reference.add_adapters`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.kernels._native_basic import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.calls import Adapters


def adder(rt: Runtime) -> Callable[[Tensor, Tensor, Adapters], Tensor]:
    """The op over one runtime; it changes y where it is. What it reads of adapters, it reads when it runs: a recorded
    step sees those that came since."""
    ADD = rt.op("add_adapters")

    def add_adapters(y: Tensor, x: Tensor, adapters: Adapters) -> Tensor:
        down, up, index = adapters.down, adapters.up, adapters.index
        y_TM, x_TN = rows_of(y), rows_of(x)
        (rows, n), m = x_TN.shape, y_TM.shape[1]
        _, parts, most, inputs = down.shape
        if inputs != n or up.shape[1:] != (most, m) or y_TM.shape[0] != rows or index.shape != (rows,):
            shapes = f"x {list(x.shape)}, y {list(y.shape)}, down {list(down.shape)}, up {list(up.shape)}"
            raise ValueError(f"adapters of {list(index.shape)} tokens do not fit: {shapes}")
        if down.dtype not in (torch.bfloat16, torch.float32) or up.dtype != down.dtype:
            raise TypeError(f"stacks of adapters are bfloat16 or float32, not {down.dtype} and {up.dtype}")
        small = rt.empty((rows, parts, most))
        rt.call(
            ADD, rows * most * (parts * n + m) // 16, x=x_TN.data_ptr(), index=index.data_ptr(),
            facts=adapters.facts.data_ptr(), down=down.data_ptr(), up=up.data_ptr(), factor=adapters.factor.data_ptr(),
            shift=adapters.shift.data_ptr(), ends=adapters.ends.data_ptr(), small=small.data_ptr(), y=y_TM.data_ptr(),
            rows=rows, inputs=n, outputs=m, parts=parts, most=most, x_stride=x_TN.stride(0), y_stride=y_TM.stride(0),
            half=down.dtype == torch.bfloat16,
        )  # fmt: skip
        return y

    return add_adapters
